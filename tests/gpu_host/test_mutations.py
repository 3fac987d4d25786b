"""The faults that show in results alone: what mutation_check.py finds of them, in every test run.

The others are shown by test_simt_runtime.py, and `make mutations` goes through all.
"""

import pytest
from host_gpu import ROOT, missing
from mutation_check import MUTATIONS, verdict

IN_RESULTS = {
    "halo one channel too short": "wrong result: y: error",
    "the tail of a plane left out": "wrong result: y: error nan",  # an element never written
}


@pytest.mark.skipif(missing is not None, reason=str(missing))
@pytest.mark.parametrize("name", IN_RESULTS)
def test_a_fault_that_shows_in_results_is_found(name, tmp_path):
    (mutation,) = (m for m in MUTATIONS if m.name == name)
    assert verdict(mutation, tmp_path).startswith(IN_RESULTS[name])


def test_every_fault_can_still_be_written_into_the_sources():
    for mutation in MUTATIONS:
        assert (ROOT / "csrc" / mutation.file).read_text().count(mutation.old) == 1, mutation.name
