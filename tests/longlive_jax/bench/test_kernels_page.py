"""docs/kernels.md shows the committed table, and the table is what compiling gives."""

import json

import pytest

from longlive_jax.bench import kernels_page
from longlive_jax.planning import deviceless
from pallas_kernels.catalog import catalog

ROWS = json.loads(kernels_page.TABLE.read_text())


def test_the_page_shows_the_table():
    page = kernels_page.PAGE.read_text()
    assert kernels_page.with_tables(page, ROWS) == page


def test_the_table_has_every_kernel():
    listed = {(row["kernel"], row["chip"]) for row in ROWS}
    assert listed == {(name, chip) for name, x in catalog().items() for chip in x.chips}


def test_attention_is_modelled_within_the_limits():
    shares = {x["kernel"]: x["model_share"] for x in ROWS if x["kernel"].startswith("attention")}
    assert len(shares) >= 5
    assert all(0 < share < 1 for share in shares.values())


@pytest.mark.slow
@pytest.mark.skipif(deviceless.refusal() is not None, reason=str(deviceless.refusal()))
def test_the_table_is_what_compiling_gives():
    assert kernels_page.compiled_rows() == ROWS
