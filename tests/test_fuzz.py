"""Some of the mutations that `make fuzz` tries by the ten thousand."""

import json
from pathlib import Path

from launched import python

FUZZ = Path(__file__).with_name("fuzz.py")


def test_every_reader_refuses_or_reads_what_was_there(tmp_path, launch_environment):
    options = ("--mutations", "50", "--seed", "1", "--out", tmp_path / "fuzz.json")
    done = python(FUZZ, *options, env=launch_environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    results = json.loads((tmp_path / "fuzz.json").read_text())
    assert results["bad"] == []
    for name, reader in results["readers"].items():
        # the report shows what can be read of any run; an LSTM has nothing to sample from
        assert reader["refused"] or name.endswith(" reported"), name
        assert reader["harmless"] or name == "lstm sampled", name
