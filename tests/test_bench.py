"""The tools in tests/bench: their settings are those of the script, their tables hold the runs."""

import json
import sys

from helpers import ROOT

import train_gpt

sys.path.insert(0, str(ROOT / "tests" / "bench"))

import ladder  # noqa: E402


def test_each_rung_is_a_configuration_and_the_table_compares_equal_seeds(tmp_path):
    for index, rung in enumerate(ladder.RUNGS):
        environ = {name: str(value) for name, value in ladder.settings_of(index).items()}
        config = train_gpt.Config.from_env(environ)
        for name, value in rung.settings.items():
            assert getattr(config, name.lower()) == value
    for rung, seed, packed in [(0, 42, 1.52), (0, 43, 1.50), (1, 42, 1.49)]:
        folder = tmp_path / f"rung{rung:02d}_seed{seed}_steps300"
        folder.mkdir()
        scores = dict(pre_quant=dict(val_bpb=1.4), final_int6_roundtrip=dict(val_bpb=packed))
        result = dict(finished=True, scores=scores, artifact_bytes=2_699_000, step_avg_ms=3000.0)
        (folder / "scores.json").write_text(json.dumps(result))
    table = ladder.report(ladder.finished_cells(tmp_path))
    # Against seed 42 of base_7k, not against the mean of its seeds.
    assert table.count("-0.0300") == 2 and "0.0200" in table
