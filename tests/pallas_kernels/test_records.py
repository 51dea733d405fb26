"""Every kernel on the cases of its record, in the interpreter: equal to its oracle, and no race.

python -m pytest tests/pallas_kernels/test_records.py -k attention_forward_hopper
"""

import pytest

from pallas_kernels.catalog import catalog
from pallas_kernels.kernel import Kernel, error
from tests.pallas_kernels.interpreter import SIMULATED, block_scaled_products, no_races

INTERPRETED = [kernel for kernel in catalog().values() if kernel.not_interpreted is None]
MASKED = {"no keys", "blind query tile", "one tile", "one row", "three tiles"}
MASKED |= {"NaN in unseen keys", "NaN in unseen values", "large logits"}
BLOCKS = {"one block", "ragged groups", "all zero", "NaN in a row"}
KINDS = {
    "attention": MASKED | {"NaN in blind queries and their gradients"},
    "attention_packed": MASKED - {"three tiles", "NaN in unseen keys", "NaN in unseen values"}
    | {"no past keys", "NaN in an unseen slot"},
    "quantize": BLOCKS | {"one row", "equal values"},
    "quantize_both": {"one program", "two passes", "all zero", "NaN in a row"},
    "statistics": {"one group of rows", "ragged columns and programs", "NaN in a row"},
    "dequantize": BLOCKS,
    "matmul": {"one row", "ragged tiles", "tiles do not divide the grid", "all zero"},
}
"""Operation -> cases that each of its kernels must have."""


def failures(kernel: Kernel, *, slow: bool) -> list[str]:
    """What is wrong with a kernel's results on its cases, or the slow ones among them."""
    wrong = []
    for case in kernel.cases:
        if case.slow != slow:
            continue
        arguments = case.build()
        launches = kernel.launches if case.launches is None else case.launches
        try:
            with block_scaled_products(), no_races(launches):
                got = kernel.run(*arguments, interpret=SIMULATED)
        except AssertionError as races:
            wrong.append(f"{case.name}: {races}")
            continue
        off = error(got, kernel.oracle(*arguments))
        if not off <= kernel.tolerance:
            wrong.append(f"{case.name}: {off:.1e} from the oracle, at most {kernel.tolerance:.1e}")
    return wrong


@pytest.mark.parametrize("kernel", INTERPRETED, ids=lambda kernel: kernel.name)
def test_it_equals_its_oracle_without_races(kernel):
    assert not failures(kernel, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", INTERPRETED, ids=lambda kernel: kernel.name)
def test_its_other_cases(kernel):
    assert not failures(kernel, slow=True)


@pytest.mark.parametrize("kernel", catalog().values(), ids=lambda kernel: kernel.name)
def test_a_record_is_complete(kernel):
    names = [case.name for case in kernel.cases]
    assert KINDS[kernel.op] <= set(names) and len(names) == len(set(names))
    assert kernel.cost(*kernel.cases[-1].build()).bytes > 0
    assert kernel.chips and kernel.instructions
