"""The project's words: one test a rule.

Identifiers are the field's terms, and every docstring begins with what a thing is or does.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    p for top in ("longlive_jax", "pallas_kernels", "configs") for p in (ROOT / top).rglob("*.py")
)
FILES = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))]

VAGUE = {
    "found", "said", "told", "kept", "there", "one", "made", "over", "laid", "lies", "lying",
    "placed", "placer", "shown", "judged", "taken", "alike", "dressed", "dress", "naive", "apart",
    "besides",
}  # fmt: skip
"""Local names that say nothing of what they hold."""

REPLACED = {
    "Episode": "TeacherForcingBatch",
    "EpisodeSpec": "WindowSpec",
    "Seen": "AttentionContext",
    "Past": "LayerKV",
    "ArrayPast": "DenseLayerKV",
    "PackedPast": "PackedLayerKV",
    "remember": "compute_kv, write_context",
    "remember_chunk": "write_context",
    "Unpack": "Materialize",
    "as_is": "identity",
    "as_they_are": "no_preparation",
    "all_alike": "uniform_weight",
    "forgetful": "stateless",
    "Judged": "LossOutput",
    "Order": "ChunkInputs",
    "Setting": "VideoConditioning",
    "Request": "ChunkRequest",
    "laid_out": "self_attention, make_attention",
    "lay_out": "make_attention",
    "bind_shot": "set_shot_sink",
    "in_one_line": "contiguous_layout",
    "Shared": "ShardedLoss",
    "shared": "sharded, or replicated",
    "Sharing": "VAEShardPlan",
    "sharing": "plan_vae_shards",
    "shared_forward": "sharded_forward",
    "shared_ar_loss": "sharded_teacher_forcing_loss",
    "encode_shared": "encode_sharded",
    "whole": "replicated, all_gather_tokens, gather, ...",
    "WHOLE": "REPLICATED",
    "rope_offset": "shot_rope_offset",
    "phase": "shot_rope_offset",
    "temporal_ratio": "temporal_stride",
    "Saves": "TrainCheckpoints",
    "Work": "StepCost, EncodingPlan, EncoderFlops",
    "ffn_parts": "ffn_chunks",
    "all_right": "caption_correct",
}
"""Identifiers with another meaning in the field, and what replaced them."""

ELSEWHERE = {
    "phase": ("longlive_jax.small_world.stage_vae", "tests.longlive_jax.small_world.test_stage_vae")
}
"""Modules in which such a word has its usual meaning: the phases of a run."""


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def definitions(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of every function, class, argument, variable, field and keyword of ours."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring, those after assignments included."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for child in body if isinstance(body, list) else []:
            value = getattr(child, "value", None) if isinstance(child, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield child.lineno, value.value.strip()


def violations(paths, check) -> list[str]:
    """`file:line: reason` for everything that `check(tree, source)` yields."""
    reasons = []
    for path in paths:
        source = path.read_text()
        for line, reason in check(ast.parse(source), source):
            reasons.append(f"{path.relative_to(ROOT)}:{line}: {reason}")
    return reasons


def test_names_say_what_they_hold():
    def check(tree, _source):
        return ((line, name) for line, name in definitions(tree) if name in VAGUE)

    assert not (wrong := violations(FILES, check)), "\n".join(wrong)


def test_replaced_identifiers_do_not_come_back():
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name} -> {REPLACED[name]}"
        for path in FILES
        for line, name in definitions(ast.parse(path.read_text()))
        if name in REPLACED and name_of(path) not in ELSEWHERE.get(name, ())
    ]
    assert not wrong, "\n".join(wrong)


def test_docstrings_begin_with_what_a_thing_is_or_does():
    def check(tree, _source):
        return ((n, text[:60]) for n, text in docstrings(tree) if re.match(r"Of\b", text))

    assert not (wrong := violations(FILES, check)), "\n".join(wrong)


def test_docstrings_list_fields_line_by_line():
    def check(tree, _source):
        return (
            (n, text[:60]) for n, text in docstrings(tree) if re.search(r"\bFields?: ?[`\w]", text)
        )

    assert not (wrong := violations(FILES, check)), "\n".join(wrong)


def test_long_functions_have_step_comments():
    """More than 25 lines of code without a comment give a reader no landmark."""

    def check(tree, source):
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        comments = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            lines = range(body[0].lineno, node.end_lineno + 1)
            if len(lines) > 25 and not comments.intersection(lines):
                yield node.lineno, f"{node.name} has {len(lines)} lines"

    assert not (wrong := violations(SOURCES, check)), "\n".join(wrong)


def test_violations_are_found():
    source = '''def f(found):
    """Of a thing.

    Fields: `a` is b.
    """
    whole = 1
'''
    tree = ast.parse(source)
    names = {name for _, name in definitions(tree)}
    assert names & VAGUE == {"found"} and names & REPLACED.keys() == {"whole"}
    ((_, text),) = docstrings(tree)
    assert re.match(r"Of\b", text) and re.search(r"\bFields?: ?[`\w]", text)
