"""`longlive completion {bash,zsh,fish}`: prints the completion script of a shell.

Write it to the file that the shell loads, and again after an update:

    longlive completion bash > ~/.local/share/bash-completion/completions/longlive
    longlive completion zsh > ~/.zfunc/_longlive      # with fpath+=~/.zfunc before compinit
    longlive completion fish > ~/.config/fish/completions/longlive.fish

It completes verbs, options, settings after --config., recipes after --config=, choices and files.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from longlive_jax.cli.app import SUBVERBS, VERBS, Parser, parser_of
from longlive_jax.cli.recipes import known_recipes, recipe_kinds
from longlive_jax.cli.setting_groups import find_group, group_names

SHELLS = ("bash", "zsh", "fish")
SETTING = "--config."
"""Start of the options that set any setting; bash and zsh offer them only after it."""

RECIPES_FOR = {"compare": "sample", "plan": "train"}
"""Verb -> the verb whose recipes it takes, where that is another one."""

SETTINGS_FOR = {"compare": "sample"}
"""Verb -> the verb whose settings it takes, where that is another one."""


@dataclasses.dataclass(frozen=True)
class Word:
    """An option or argument of a command.

    Attributes:
      name: `--option`; empty for an argument.
      takes_value: whether a value follows.
      values: the values to offer; empty for files.
      text: its help.
    """

    name: str
    takes_value: bool
    values: tuple[str, ...]
    text: str


def main(argv: Sequence[str]) -> int:
    """Prints the script."""
    parser = Parser("completion", __doc__ or "")
    parser.add_argument("shell", choices=SHELLS, help="the shell")
    args = parser.parse_args(argv)
    commands = {name: list(command_words(name)) for name in command_names()}
    print({"bash": bash, "zsh": zsh, "fish": fish}[args.shell](commands), end="")
    return 0


def command_names() -> list[str]:
    """All verbs that have options, and `VERB SUBVERB` for those that have verbs of their own."""
    return [
        name
        for verb in VERBS
        for name in ([f"{verb} {sub}" for sub in SUBVERBS[verb]] if verb in SUBVERBS else [verb])
    ]


def command_words(name: str) -> Iterator[Word]:
    """The options and arguments of a verb or `VERB SUBVERB`."""
    if name == "settings":
        yield Word("", True, tuple(_recipes(None)), "a recipe")
    if name == "completion":
        yield Word("", True, SHELLS, "the shell")
        return
    parser = parser_of(name.split())
    for action in parser.public_actions() if parser is not None else ():
        if not action.option_strings:
            continue
        values = tuple(map(str, action.choices or ()))
        if action.dest == "config":
            values = tuple(_recipes(RECIPES_FOR.get(name, name)))
        text = (action.help or "").replace("%%", "%")
        yield Word(action.option_strings[-1], action.nargs != 0, values, text)
    yield from _setting_words(name)
    yield Word("--help", False, (), "show the help")


def _setting_words(name: str) -> Iterator[Word]:
    """`--config.SETTING` of the groups of a verb, once each."""
    verb = SETTINGS_FOR.get(name, name)
    names = [group for group in group_names() if group.split(" ")[0] == verb]
    rows = {row.path: row for group in names for row in find_group(group).rows}
    for row in rows.values():
        choices = row.type.split(" | ") if " | " in row.type else ()
        values = ("true", "false") if row.type == "bool" else tuple(choices)
        if not row.is_group and "[]" not in row.path:
            yield Word(f"{SETTING}{row.path}", True, values, row.meaning)


def _recipes(verb: str | None) -> Iterator[str]:
    """Names of the recipes of a verb, or of all verbs."""
    for name in known_recipes():
        for argument, kind in recipe_kinds(name).items():
            if verb in (None, kind):
                yield f"{name}:{argument}" if argument else name


type Commands = dict[str, list[Word]]


def _cases(commands: Commands) -> str:
    """Shell functions for bash and zsh: a command's words and settings, and an option's values.

    Options that take a value end in `=`.
    """
    words = {"": [*VERBS, "help"], "help": list(VERBS)} | {v: list(s) for v, s in SUBVERBS.items()}
    settings = {}
    for name, items in commands.items():
        options = [f"{item.name}{'=' * item.takes_value}" for item in items if item.name]
        words[name] = [option for option in options if not option.startswith(SETTING)]
        words[name] += [value for item in items if not item.name for value in item.values]
        settings[name] = [option for option in options if option.startswith(SETTING)]
    values = {
        f"{name} {item.name}": item.values
        for name, items in commands.items()
        for item in items
        if item.name and item.values
    }
    settings = {name: options for name, options in settings.items() if options}
    tables: dict[str, Mapping[str, Sequence[str]]]
    tables = {"words": words, "settings": settings, "values": values}
    functions = [_function(name, table) for name, table in tables.items()]
    return "".join([*functions, COMMAND.replace("SUBVERBS", " ".join(SUBVERBS))])


def _function(name: str, table: Mapping[str, Sequence[str]]) -> str:
    """A shell function that prints the entry of its argument in a table."""
    cases = [f"        '{key}') echo '{' '.join(items)}' ;;" for key, items in table.items()]
    head = [f"_longlive_{name}() {{", '    case "$1" in']
    return "\n".join([*head, *cases, "    esac", "}", ""])


def bash(commands: Commands) -> str:
    """The script for bash."""
    return f"# Completion of longlive for bash.\n{_cases(commands)}{BASH}"


def zsh(commands: Commands) -> str:
    """The script for zsh."""
    return f"#compdef longlive\n# Completion of longlive for zsh.\n{_cases(commands)}{ZSH}"


def fish(commands: Commands) -> str:
    """The script for fish, one line per verb and option."""
    lines = ["# Completion of longlive for fish."]
    first = "complete -c longlive -n __fish_use_subcommand -f"
    for verb, text in (VERBS | {"help": "print the help of a verb"}).items():
        lines.append(f"{first} -a {verb} -d {_quoted(text)}")
    lines.append(f"{_fish_line('help')} -f -a {_quoted(' '.join(VERBS))}")
    for verb, subverbs in SUBVERBS.items():
        condition = f"__fish_seen_subcommand_from {verb}; and not __fish_seen_subcommand_from"
        names = " ".join(subverbs)
        lines.append(
            f"complete -c longlive -n {_quoted(f'{condition} {names}')} -f -a {_quoted(names)}"
        )
    for name, items in commands.items():
        for item in items:
            values = f" -a {_quoted(' '.join(item.values))}" if item.values else ""
            kind = "" if not item.takes_value else " -x" if item.values else " -r"
            option = f" -l {item.name.removeprefix('--')}{kind}" if item.name else " -f"
            text = _quoted(item.text.partition(";")[0])
            lines.append(f"{_fish_line(name)}{option}{values} -d {text}")
    return "\n".join([*lines, ""])


def _fish_line(name: str) -> str:
    """The start of a line of fish for options of a verb or `VERB SUBVERB`."""
    condition = "; and ".join(f"__fish_seen_subcommand_from {word}" for word in name.split())
    return f"complete -c longlive -n {_quoted(condition)}"


def _quoted(text: str) -> str:
    """Text in single quotes, for fish."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


COMMAND = r"""_longlive_command() {  # the verbs among the words of a command line
    local command='' word
    for word in "$@"; do
        case $word in
            -*) ;;
            *)
                if [[ -z $command ]]; then command="$word"
                elif [[ ' SUBVERBS ' == *" $command "* ]]; then command="$command $word"; break
                else break; fi ;;
        esac
    done
    echo "$command"
}
"""

BASH = r"""
_longlive() {
    local line="${COMP_LINE:0:COMP_POINT}" current command previous='' breaks='' cut='' word
    local -a words candidates
    read -ra words <<< "$line"
    current="${line##*[[:space:]]}"
    [[ -n $current ]] && unset "words[${#words[@]}-1]"
    (( ${#words[@]} > 1 )) && previous="${words[${#words[@]}-1]}"
    command="$(_longlive_command "${words[@]:1}")"
    # 1. The candidates, as they would be written in the command line.
    if [[ $current == --*=* ]]; then
        word="${current%%=*}"
        candidates=($(_longlive_values "$command $word"))
        candidates=("${candidates[@]/#/$word=}")
    elif [[ $previous == -* && " $(_longlive_words "$command") " == *" $previous= "* ]]; then
        candidates=($(_longlive_values "$command $previous"))
    elif [[ $current == --config.* ]]; then
        candidates=($(_longlive_settings "$command"))
    else
        candidates=($(_longlive_words "$command"))
    fi
    # 2. Bash replaces only what follows the last of its word breaks.
    [[ $COMP_WORDBREAKS == *=* ]] && breaks+='='
    [[ $COMP_WORDBREAKS == *:* ]] && breaks+=':'
    [[ -n $breaks ]] && cut="${current%"${current##*[$breaks]}"}"
    COMPREPLY=()
    for word in "${candidates[@]}"; do
        [[ $word == "$current"* ]] && COMPREPLY+=("${word#"$cut"}")
    done
    [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *= ]] && compopt -o nospace 2> /dev/null
    return 0
}
complete -o default -F _longlive longlive
"""

ZSH = r"""
_longlive() {
    local command previous=${words[CURRENT-1]} option
    local -a candidates options
    command="$(_longlive_command ${words[2,CURRENT-1]})"
    if [[ $PREFIX == --*=* ]]; then
        option=${PREFIX%%=*}
        compset -P '*='
        candidates=(${=$(_longlive_values "$command $option")})
    elif [[ $previous == -* && " $(_longlive_words "$command") " == *" $previous= "* ]]; then
        candidates=(${=$(_longlive_values "$command $previous")})
    else
        candidates=(${=$(_longlive_words "$command")})
        [[ $PREFIX == --config.* ]] && candidates=(${=$(_longlive_settings "$command")})
        options=(${(M)candidates:#*=})
        candidates=(${candidates:#*=})
        compadd -S '' -a options
    fi
    if (( $#candidates )); then compadd -a candidates; else _files; fi
}
if [[ $funcstack[1] == _longlive ]]; then _longlive "$@"; else compdef _longlive longlive; fi
"""
