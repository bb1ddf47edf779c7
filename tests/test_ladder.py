"""The ladder's page: what it says of the runs that are there, and of those that are not."""

import json

import ladder
import pytest

import train_gpt


def cell(folder, rung, seed, packed):
    """A finished run of 300 steps, as train_gpt.py leaves it."""
    run = folder / f"rung{rung:02d}_seed{seed}_steps300"
    run.mkdir(parents=True)
    scores = dict(pre_quant=dict(val_bpb=packed - 0.001))
    scores["final_int6_roundtrip"] = dict(val_bpb=packed)
    facts = dict(finished=True, scores=scores, artifact_bytes=2_699_000, step_avg_ms=3000.0)
    (run / "scores.json").write_text(json.dumps(facts))


def test_the_page_compares_with_base_and_with_the_rung_below(tmp_path, monkeypatch):
    last = len(ladder.RUNGS) - 1
    for rung, seed, packed in [(0, 42, 1.52), (0, 43, 1.50), (1, 42, 1.49), (last, 42, 1.46)]:
        cell(tmp_path / "some_text", rung, seed, packed)
    (tmp_path / "some_text" / "text.md").write_text("Text of a test.")
    page = tmp_path / "page.md"
    arguments = ["ladder.py", "--report", "--out", str(tmp_path / "some_text")]
    monkeypatch.setattr("sys.argv", [*arguments, "--document", str(page)])
    ladder.main()
    text = page.read_text()
    assert "## some_text\n\nText of a test.\n\n### 300 steps" in text
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line[:1] == "|"}
    assert "0.0200" in rows["base_7k"]  # between the two seeds
    # Against seed 42 of base_7k, not against the mean of its seeds.
    assert rows[ladder.RUNGS[1].name].count("-0.0300") == 2
    # The rung below the last one was not trained.
    assert rows[ladder.RUNGS[last].name].count("-0.0600") == 1
    assert ladder.RUNGS[2].name not in rows
    assert "SHUFFLE=1" in text


def test_a_folder_without_runs_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["ladder.py", "--report", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="no finished run"):
        ladder.main()


def test_the_whole_ladder_is_frontier_1024_at_another_size():
    """What the page measures is what the preset trains, but for sizes, rates and their schedule."""
    environ = {
        name: str(value) for name, value in ladder.settings_of(len(ladder.RUNGS) - 1).items()
    }
    top = train_gpt.Config.from_env(environ)
    preset = train_gpt.Config.from_env({"PRESET": "frontier_1024"})
    parts = ["smear_inputs", "gate_inputs", "gated_attention", "value_residual", "skip_gates"]
    parts += ["num_loops", "loop_at", "mlp_mult", "bigram_vocab_size", "shuffle", "muon_row_norm"]
    for name in parts:
        assert getattr(top, name) == getattr(preset, name), name
    assert top.parallel_last_n > 0 < preset.parallel_last_n
