"""Parser for the pickle streams in PyTorch checkpoints, which cannot execute code.

Nothing is imported, looked up or called. A stream is a list of opcodes. Those on the allow-list
act on plain containers, a reference to a global stays a name, and the only calls with an effect
are the few that PyTorch writes for tensors and containers. Everything else is refused. Sizes are
bounded: no container can nest deeper or grow larger than the stream itself spells out.
"""

import dataclasses
import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO

from longlive_jax.spec import UserError

__all__ = ["Global", "StateDict", "TensorCall", "read_pickle", "replace_tensor_calls"]

MAX_DEPTH = 64
MAX_NODES = 500_000
MAX_INTEGER_BYTES = 16


@dataclasses.dataclass(frozen=True)
class Global:
    """The name of a global that a stream refers to; it is never resolved."""

    name: str


@dataclasses.dataclass(frozen=True)
class TensorCall:
    """A call of one of PyTorch's tensor rebuilders, with its arguments."""

    name: str
    args: tuple


class StateDict(dict):
    """A dictionary that records the keys that were set more than once."""

    def __init__(self):
        super().__init__()
        self.duplicates: list[str] = []

    def put(self, key: Any, value: Any) -> None:
        """Sets a key; raises ValueError if its type is not a plain one."""
        if not isinstance(key, str | int | float | bool | type(None)):
            raise ValueError(f"a dictionary key must be plain data, got {type(key).__name__}")
        if key in self:
            self.duplicates.append(str(key))
        self[key] = value


_MARK = object()

TORCH_DTYPES = {
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
KNOWN = TORCH_DTYPES | STORAGES | TENSOR_CALLS | PARAMETER_CALLS | CONTAINER_CALLS


def read_pickle(stream: BinaryIO, where: str, *, persistent: Callable[[Any], Any]) -> Any:
    """The value of the pickle at the stream's position.

    Args:
      stream: stream at the start of a pickle; afterwards it is just after the STOP opcode.
      where: file name for messages.
      persistent: function from a persistent id (a plain tuple) to its value.

    Raises UserError for a damaged stream, and for anything but tensors and plain data.
    """
    machine = _Machine(where, persistent)
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            machine.step(opcode.name, argument)
        return machine.result()
    except UserError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise UserError(
            f"{where}: is damaged ({error}); copy or download the file again"
        ) from error


class _Machine:
    """The pickle machine of one stream: its stack and memo."""

    def __init__(self, where: str, persistent: Callable[[Any], Any]):
        self.where, self.persistent = where, persistent
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Executes one opcode; raises UserError if it is not on the allow-list."""
        if name in _LITERALS:
            self.stack.append(_literal(argument))
        elif name in _ACTIONS:
            _ACTIONS[name](self, argument)
        else:
            raise UserError(f"{self.where}: pickle opcode {name} is refused{_REMEDY}")

    def result(self) -> Any:
        """The value of the stream: the only one on the stack."""
        if len(self.stack) != 1:
            raise ValueError(f"the stream must end with 1 value, got {len(self.stack)}")
        return self.pop()

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("a mark instead of a value")
        return value

    def pop_to_mark(self) -> list[Any]:
        index = len(self.stack) - 1
        while self.stack[index] is not _MARK:  # `read_pickle` catches IndexError (empty stack)
            index -= 1
            if index < 0:
                raise ValueError("no mark on the stack")
        values = self.stack[index + 1 :]
        del self.stack[index:]
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
            state = StateDict()
            for key, value in args[0] if args else ():
                state.put(key, value)
            return state
        raise UserError(f"{self.where}: a call of {name} is refused{_REMEDY}")

    def set_items(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, StateDict) or len(pairs) % 2:
            raise ValueError("items are set on something that is not a dictionary")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            target.put(key, value)

    def append(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise ValueError("elements are appended to something that is not a list")
        self.stack[-1].extend(values)

    def build(self, _: Any) -> None:
        # The only accepted attribute is `_metadata`: the version numbers of a state_dict().
        state, target = self.pop(), self.stack[-1]
        is_plain = isinstance(target, StateDict) and isinstance(state, StateDict)
        if not is_plain or set(state) - {"_metadata"}:
            raise UserError(f"{self.where}: setting attributes of an object is refused{_REMEDY}")

    def stack_global(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("a global has no name")
        self.push_global(f"{module}.{name}")

    def set_item(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        self.set_items([key, value])

    def pop_many(self, count: int) -> tuple:
        values = [self.pop() for _ in range(count)]
        return tuple(reversed(values))

    def memoize(self, index: int) -> None:
        self.memo[index] = self.stack[-1]


_REMEDY = "; only tensors and plain containers are read, and nothing in the file was executed"

# Opcodes that push their own argument.
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
    "TUPLE": lambda m, a: m.stack.append(tuple(m.pop_to_mark())),
    "TUPLE1": lambda m, a: m.stack.append(m.pop_many(1)),
    "TUPLE2": lambda m, a: m.stack.append(m.pop_many(2)),
    "TUPLE3": lambda m, a: m.stack.append(m.pop_many(3)),
    "APPEND": lambda m, a: m.append([m.pop()]),
    "APPENDS": lambda m, a: m.append(m.pop_to_mark()),
    "SETITEM": _Machine.set_item,
    "SETITEMS": lambda m, a: m.set_items(m.pop_to_mark()),
    "BINPUT": _Machine.memoize,
    "LONG_BINPUT": _Machine.memoize,
    "MEMOIZE": lambda m, a: m.memoize(len(m.memo)),
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
        limit = 8 * MAX_INTEGER_BYTES
        raise ValueError(f"an integer must have <= {limit} bits, got {argument.bit_length()}")
    return argument


def replace_tensor_calls(value: Any, leaf: Callable[[Any], Any], where: str) -> Any:
    """A copy of a plain value with every `TensorCall` replaced by `leaf(call)`.

    Depth and number of nodes are bounded, since memoised references can encode an exponentially
    large or infinite value in a few bytes. Raises UserError beyond the limits.
    """
    remaining = MAX_NODES

    def visit(node: Any, depth: int) -> Any:
        nonlocal remaining
        remaining -= 1
        if depth > MAX_DEPTH or remaining < 0:
            raise UserError(
                f"{where}: not a checkpoint: nested deeper than {MAX_DEPTH} levels or more than "
                f"{MAX_NODES} values"
            )
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
