"""A reader of the pickle stream inside PyTorch checkpoints that cannot run anything.

Nothing is imported, looked up or called. A stream is a list of opcodes; those on the allow-list
are carried out on plain containers, a reference to a global stays a name, and the only calls that
mean anything are the few that PyTorch writes for tensors (`CALLS`). Everything else is refused.
Sizes are bounded: no container can nest or grow beyond what the stream itself spells out.
"""

import dataclasses
import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO

from longlive_jax.spec import UserError

__all__ = ["Global", "StateDict", "TensorCall", "read_pickle", "walk"]

MAX_DEPTH = 64
MAX_NODES = 500_000
MAX_INTEGER_BYTES = 16


@dataclasses.dataclass(frozen=True)
class Global:
    """The name of something a stream refers to; never resolved."""

    name: str


@dataclasses.dataclass(frozen=True)
class TensorCall:
    """A call of one of PyTorch's tensor rebuilders, with its arguments."""

    name: str
    args: tuple


class StateDict(dict):
    """A dictionary that remembers keys written twice."""

    def __init__(self):
        super().__init__()
        self.duplicates: list[str] = []

    def put(self, key: Any, value: Any) -> None:
        """Sets a key of a plain type; ValueError for any other type."""
        if not isinstance(key, str | int | float | bool | type(None)):
            raise ValueError(f"a dictionary key of type {type(key).__name__}")
        if key in self:
            self.duplicates.append(str(key))
        self[key] = value


_MARK = object()

DTYPES = {
    f"torch.{name}"
    for name in (
        *("float64", "double", "float32", "float", "float16", "half", "bfloat16", "bool"),
        *("int64", "long", "int32", "int", "int16", "short", "int8"),
        *("uint8", "uint16", "uint32", "uint64", "complex64", "complex128"),
        *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
    )
}
STORAGES = {
    "torch.storage.UntypedStorage",
    *(f"torch.{name}Storage" for name in ("Double", "Float", "Half", "BFloat16", "Bool", "Char")),
    *(f"torch.{name}Storage" for name in ("Long", "Int", "Short", "Byte")),
    *("torch.ComplexFloatStorage", "torch.ComplexDoubleStorage"),
}
TENSOR_CALLS = {f"torch._utils._rebuild_tensor{version}" for version in ("", "_v2", "_v3")}
PARAMETER_CALLS = {
    "torch._utils." + name for name in ("_rebuild_parameter", "_rebuild_parameter_with_state")
}
CONTAINER_CALLS = {"collections.OrderedDict", "torch.Size", "torch.device"}
KNOWN = DTYPES | STORAGES | TENSOR_CALLS | PARAMETER_CALLS | CONTAINER_CALLS


def read_pickle(stream: BinaryIO, where: str, *, persistent: Callable[[Any], Any]) -> Any:
    """The value of one pickle at the stream's position.

    Args:
      stream: positioned at the pickle; left behind its STOP opcode.
      where: name of the file for messages.
      persistent: turns a persistent id (a plain tuple) into a value.

    Raises UserError for a damaged stream and for anything that is neither a tensor nor plain data.
    """
    machine = _Machine(where, persistent)
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            machine.step(opcode.name, argument)
        return machine.result()
    except UserError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise UserError(f"{where}: is damaged ({error}); copy or download it again") from error


class _Machine:
    """The stack and the memo of one stream."""

    def __init__(self, where: str, persistent: Callable[[Any], Any]):
        self.where, self.persistent = where, persistent
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Carries out one opcode."""
        if name in _LITERALS:
            self.stack.append(_literal(argument))
        elif name in _ACTIONS:
            _ACTIONS[name](self, argument)
        else:
            raise UserError(f"{self.where}: pickle opcode {name} is not read{_REMEDY}")

    def result(self) -> Any:
        """What STOP found on the stack."""
        if len(self.stack) != 1:
            raise ValueError(f"{len(self.stack)} values left over")
        return self.pop()

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("a mark where a value belongs")
        return value

    def to_mark(self) -> list[Any]:
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:  # IndexError at the bottom is caught above
            at -= 1
            if at < 0:
                raise ValueError("no mark on the stack")
        values = self.stack[at + 1 :]
        del self.stack[at:]
        return values

    def push_global(self, name: str) -> None:
        name = name.replace("__builtin__.", "builtins.")
        if name not in KNOWN:
            raise UserError(f"{self.where}: refers to {name}, which is refused{_REMEDY}")
        self.stack.append(Global(name))

    def reduce(self, _: Any) -> None:
        args, function = self.pop(), self.pop()
        if not isinstance(function, Global) or not isinstance(args, tuple):
            raise UserError(f"{self.where}: a call of a non-function is refused{_REMEDY}")
        self.stack.append(self._call(function.name, args))

    def _call(self, name: str, args: tuple) -> Any:
        if name in TENSOR_CALLS:
            return TensorCall(name, args)
        if name in PARAMETER_CALLS and args and isinstance(args[0], TensorCall):
            return args[0]
        if name == "torch.Size" and len(args) == 1 and isinstance(args[0], tuple | list):
            return tuple(args[0])
        if name == "torch.device":
            return ":".join(map(str, args))
        if name == "collections.OrderedDict" and len(args) <= 1:
            made = StateDict()
            for key, value in args[0] if args else ():
                made.put(key, value)
            return made
        raise UserError(f"{self.where}: a call of {name} is refused{_REMEDY}")

    def set_items(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, StateDict) or len(pairs) % 2:
            raise ValueError("items for something that is no dictionary")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            target.put(key, value)

    def append(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise ValueError("elements for something that is no list")
        self.stack[-1].extend(values)

    def build(self, _: Any) -> None:
        # state_dict() carries its version numbers as an attribute of the OrderedDict
        state, target = self.pop(), self.stack[-1]
        plain = isinstance(target, StateDict) and isinstance(state, StateDict)
        if not plain or set(state) - {"_metadata"}:
            raise UserError(f"{self.where}: setting attributes of an object is refused{_REMEDY}")

    def stack_global(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("a global without a name")
        self.push_global(f"{module}.{name}")

    def last_two(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        self.set_items([key, value])

    def take(self, count: int) -> tuple:
        values = [self.pop() for _ in range(count)]
        return tuple(reversed(values))

    def remember(self, index: int) -> None:
        self.memo[index] = self.stack[-1]


_REMEDY = "; only tensors and plain containers are read, and nothing of the file was executed"

# opcodes that push their own argument
_LITERALS = frozenset({
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "BINUNICODE8",
    "SHORT_BINUNICODE", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
})  # fmt: skip
_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda m, a: None,
    "FRAME": lambda m, a: None,
    "STOP": lambda m, a: None,
    "NONE": lambda m, a: m.stack.append(None),
    "NEWTRUE": lambda m, a: m.stack.append(True),
    "NEWFALSE": lambda m, a: m.stack.append(False),
    "MARK": lambda m, a: m.stack.append(_MARK),
    "EMPTY_DICT": lambda m, a: m.stack.append(StateDict()),
    "EMPTY_LIST": lambda m, a: m.stack.append([]),
    "EMPTY_TUPLE": lambda m, a: m.stack.append(()),
    "TUPLE": lambda m, a: m.stack.append(tuple(m.to_mark())),
    "TUPLE1": lambda m, a: m.stack.append(m.take(1)),
    "TUPLE2": lambda m, a: m.stack.append(m.take(2)),
    "TUPLE3": lambda m, a: m.stack.append(m.take(3)),
    "APPEND": lambda m, a: m.append([m.pop()]),
    "APPENDS": lambda m, a: m.append(m.to_mark()),
    "SETITEM": _Machine.last_two,
    "SETITEMS": lambda m, a: m.set_items(m.to_mark()),
    "BINPUT": _Machine.remember,
    "LONG_BINPUT": _Machine.remember,
    "MEMOIZE": lambda m, a: m.remember(len(m.memo)),
    "BINGET": lambda m, a: m.stack.append(m.memo[a]),
    "LONG_BINGET": lambda m, a: m.stack.append(m.memo[a]),
    "GLOBAL": lambda m, a: m.push_global(a.replace(" ", ".", 1)),
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
    "BINPERSID": lambda m, a: m.stack.append(m.persistent(m.pop())),
}


def _literal(argument: Any) -> Any:
    if isinstance(argument, int) and argument.bit_length() > 8 * MAX_INTEGER_BYTES:
        raise ValueError(f"an integer of {argument.bit_length()} bits")
    return argument


def walk(value: Any, leaf: Callable[[Any], Any], where: str) -> Any:
    """A copy of a plain value with every `TensorCall` replaced by `leaf(call)`.

    Bounded in depth and in nodes, since memoised references can spell out an exponentially large
    or an endless value in a few bytes. Raises UserError beyond the bounds.
    """
    left = [MAX_NODES]

    def visit(node: Any, depth: int) -> Any:
        left[0] -= 1
        if depth > MAX_DEPTH or left[0] < 0:
            raise UserError(f"{where}: nested too deeply or too large to be a checkpoint")
        if isinstance(node, TensorCall):
            return leaf(node)
        if isinstance(node, StateDict):
            copy = StateDict()
            copy.duplicates = node.duplicates
            copy.update((k, visit(v, depth + 1)) for k, v in node.items())
            return copy
        if isinstance(node, list | tuple):
            return type(node)(visit(v, depth + 1) for v in node)
        return node.name if isinstance(node, Global) else node

    return visit(value, 0)
