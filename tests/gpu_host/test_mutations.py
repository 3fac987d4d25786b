"""Deliberate faults in the CUDA kernels that only results show: helpers/mutations.py finds them.

test_simt_runtime.py shows the other kinds, and `make mutations` goes through all.
"""

import pytest

from helpers.gpu_host import missing
from helpers.mutations import MUTATIONS, family_of, verdict
from helpers.processes import ROOT

IN_RESULTS = {
    "halo one channel too short": "wrong result: dx: error",
    "the tail of a plane left out": "wrong result: y: error nan",  # an element never written
    "z of elements that are not there summed": "wrong result: sum 0",
    "parts of moments merged without the distance of their means": "wrong result: ",
    "planes merged without the distance of their means": "wrong result: output 1",
    "bits of half a byte not taken from the other thread": "wrong result: bits behind the end",
}


@pytest.mark.skipif(missing is not None, reason=str(missing))
@pytest.mark.parametrize("name", IN_RESULTS)
def test_a_fault_that_shows_in_results_is_found(name, tmp_path):
    (mutation,) = (m for m in MUTATIONS if m.name == name)
    found = verdict(mutation, tmp_path, family_of(mutation))
    assert found.startswith(IN_RESULTS[name])


def test_every_fault_can_still_be_written_into_the_sources():
    for mutation in MUTATIONS:
        assert (ROOT / "csrc" / mutation.file).read_text().count(mutation.old) == 1, mutation.name
