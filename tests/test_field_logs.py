"""The reader of plain logs on the shapes that scripts of the field print, and on folders of such
logs.
"""

import json

import pytest
from runs_helpers import (
    ROOT,
    assert_refused,
    bpbs_around,
    collect,
    load_run,
    logs,
    loss_of,
    make_log,
    run_collect,
    run_records,
    significance,
    submission_of,
)

FIELD_LOGS = ROOT.parent / "shared" / "field_logs"
SIZES = (
    "Serialized model: 106000000 bytes\nCode size: 90000 bytes\nSerialized model int6+lzma: "
    "15800000 bytes\n"
    "Total submission size int6+lzma: 15890000 bytes\n"
)


@pytest.fixture(autouse=True)
def no_picture(monkeypatch, tmp_path):
    """Drawing takes most of the time of a call, and no test here looks at the picture."""
    monkeypatch.setattr(collect, "draw_curves", lambda runs, title, ablation: b"picture")
    monkeypatch.chdir(tmp_path)  # where a call without --out would write


def pair(bpb, decimals=8, form="val_loss:{} val_bpb:{}"):
    """A loss and a bpb on the same text, printed with so many decimals."""
    return form.format(f"{loss_of(bpb):.{decimals}f}", f"{bpb:.{decimals}f}")


def training(seed=42, bpb=1.14):
    """A log up to the last validation of the training loop."""
    return (
        f"seed:{seed}\nstep:100/200 train_loss:2.1000 train_time:5000ms step_avg:50.00ms\n"
        f"step:200/200 {pair(bpb, 4)} train_time:10000ms step_avg:50.00ms\n"
    )


def read(tmp_path, text, name="train.log"):
    path = tmp_path / name
    path.write_text(text)
    return load_run(path)


def headline(run):
    """(stage, val_bpb) of what collect.py would choose."""
    stage = significance.choose_headline([run])
    return stage, run.scores[stage].val_bpb


# --- shapes of a final evaluation ----------------------------------------------------------------

TAILS = {
    "rounded and exact lines": (
        f"final_int8_zlib_roundtrip {pair(1.15, 4)} eval_time:1400ms\n"
        f"final_int8_zlib_roundtrip_exact {pair(1.15001234)}\n",
        ("roundtrip", 1.15001234),
    ),
    "stride in front of the loss": (
        f"final_int6_roundtrip_exact {pair(1.15)}\nfinal_sliding_window_eval stride:64 "
        f"{pair(1.12, 4)} "
        f"eval_time:70000ms\nfinal_sliding_window_eval_exact stride:64 {pair(1.12004321)}\n",
        ("sliding", 1.12004321),
    ),
    "a bare name and a space behind the colon": (
        f"quantized {pair(1.15)} eval_time:7000ms\n"
        f"quantized_sliding_window {pair(1.12, form='val_loss: {} val_bpb: {}')} "
        "eval_time:84000ms\n",
        ("sliding", 1.12),
    ),
    "equals signs and elapsed seconds": (
        f"quantized {pair(1.15)}\nttt:done {pair(1.11, 6, 'val_loss={} val_bpb={}')} "
        "elapsed=409.8s\n",
        ("TTT", 1.11),
    ),
    "test-time training without a rounded line": (
        f"diagnostic quantized {pair(1.15)}\nttt_phased: total_docs:50000 num_phases:3\n"
        f"ttp: b1/782 bl:2.1 bb:1.06\nquantized_ttt_phased {pair(1.10)} "
        "eval_time:330000ms\ntotal_eval_time:330.0s\n",
        ("TTT", 1.10),
    ),
    "the sliding score again under the challenge's name": (
        f"final_int6_roundtrip_exact {pair(1.15)}\nfinal_int6_sliding_window_exact {pair(1.12)}\n"
        f"final_int8_zlib_roundtrip_exact {pair(1.12)}\n",
        ("sliding", 1.12),
    ),
    "a tail that is scored twice": (
        f"final_int6_roundtrip_exact {pair(1.15)}\nfinal_int6_sliding_window_exact {pair(1.12)}\n"
        f"final_int6_roundtrip_exact {pair(1.1501)}\nfinal_int6_sliding_window_exact "
        f"{pair(1.1201)}\n",
        ("sliding", 1.1201),
    ),
    "a worse evaluation of a stronger kind": (
        f"final_int6_sliding_window_exact {pair(1.12)}\nlegal_ttt_exact {pair(1.13)}\n",
        ("sliding", 1.12),
    ),
    "a stronger kind that is worse by its rounding": (
        f"final_int6_sliding_window_exact {pair(1.12)}\nlegal_ttt_exact {pair(1.1204)}\n",
        ("TTT", 1.1204),
    ),
    "an ablation of the evaluation behind the result": (
        f"final_int6_roundtrip_exact {pair(1.15)}\nsteps_ablation {pair(1.154, 6)}\n"
        "wrote summary.json: total_bytes=15890000 val_bpb=1.150000\n",
        ("roundtrip", 1.15),
    ),
    "what was scored is told behind the key": (
        "val_bpb (pre-quant): 1.10\nval_bpb (int4 roundtrip): 1.15\nval_bpb (3-seed mean): 1.14\n",
        ("roundtrip", 1.15),
    ),
    "the digits of a copy under the challenge's name": (
        f"final_int8_zlib_roundtrip_ttt {pair(1.1100123, 4)}\n"
        f"final_int8_zlib_roundtrip_exact {pair(1.1100123, 7)}\n",
        ("TTT", 1.1100123),
    ),
    "a weaker evaluation printed last": (
        f"legal_ttt_exact {pair(1.10)}\nfinal_int6_roundtrip_exact {pair(1.15)}\n",
        ("TTT", 1.10),
    ),
    "a name that tells nothing, after the sliding window": (
        f"final_int6_sliding_window_exact {pair(1.12)}\nfinal_eval_mixer {pair(1.09)}\n",
        ("last evaluation", 1.09),
    ),
    "a name that tells nothing, before the sliding window": (
        f"final_eval {pair(1.15)}\nfinal_int6_sliding_window_exact {pair(1.12)}\n",
        ("sliding", 1.12),
    ),
    "bpb before loss": (
        f"final_roundtrip val_bpb: {1.15:.6f} val_loss: {loss_of(1.15):.6f}\n",
        ("roundtrip", 1.15),
    ),
    "no loss at all": ("final_roundtrip val_bpb=1.150000\n", ("roundtrip", 1.15)),
    "a ternary model, sizes twice in a line": (
        f"Total submission size: 15111456 bytes = 15.11MB\nfinal_ternary_roundtrip_exact "
        f"{pair(1.2)}\n",
        ("roundtrip", 1.2),
    ),
    "words and bars": (
        f"Roundtrip validation | {pair(1.2, 4, 'Val Loss: {} | Val BPB: {}')} | time: 12.5s\n",
        ("roundtrip", 1.2),
    ),
    "colours, a rank and a date": (
        f"\x1b[32m[rank0]: 2026-03-25 10:00:01 final_int6_roundtrip_exact {pair(1.2)}\x1b[0m\n",
        ("roundtrip", 1.2),
    ),
}


@pytest.mark.parametrize("name", TAILS)
def test_the_strongest_final_evaluation_is_read_by_its_shape(tmp_path, name):
    tail, expected = TAILS[name]
    run = read(tmp_path, training() + SIZES + tail)
    assert run.status == "finished" and headline(run) == expected


def test_float_weights_are_told_from_the_packed_model_by_words_and_by_place(tmp_path):
    before = (
        f"DIAGNOSTIC post_ema {pair(1.13)}\npre-quantization post-ema {pair(1.131)}\n"
        f"final_eval {pair(1.1)}\n"
    )
    behind = (
        f"diagnostic pre-quantization {pair(1.132)} eval_time:9052ms\n"
        f"diagnostic quantized {pair(1.15)}\n"
    )
    run = read(tmp_path, training() + before + SIZES + behind)
    assert headline(run) == ("roundtrip", 1.15)
    assert run.scores["float weights"].val_bpb == 1.132


def test_a_model_adapted_before_it_is_packed_is_no_result(tmp_path):
    before = f"ttt:start epochs=8\nDIAGNOSTIC post_ttt {pair(1.05)}\n"
    behind = f"final_int6_roundtrip {pair(1.15)}\nfinal_int6_sliding_window {pair(1.12)}\n"
    run = read(tmp_path, training() + before + SIZES + behind)
    assert headline(run) == ("sliding", 1.12) and run.scores["float weights"].val_bpb == 1.05
    assert any("the model was packed after it" in each for each in run.remarks)
    # Where nothing is scored after packing, or the model is named as packed, it is the result
    assert headline(read(tmp_path, training() + before + SIZES)) == ("TTT", 1.05)
    packed = f"final_int8_ttt_lora {pair(1.05)}\n"
    assert headline(read(tmp_path, training() + packed + SIZES + behind)) == ("TTT", 1.05)


def test_a_name_tells_that_the_model_is_packed_where_no_size_does(tmp_path):
    tail = f"artifact:15.88MB\nfinal_ternary_roundtrip {pair(1.14, 4)}\n"
    run = read(tmp_path, training() + tail + f"final_sliding {pair(1.11, 4)} (stride=16)\n")
    assert headline(run) == ("sliding", 1.11)


def test_a_summary_that_repeats_the_last_validation_is_of_float_weights(tmp_path, capsys):
    path = tmp_path / "train.log"
    path.write_text(training(bpb=1.14) + SIZES + "skipping eval\n  val_bpb: 1.1400\n")
    assert_refused(run_collect(capsys, path), 3, "no evaluation of the packed model")
    assert headline(read(tmp_path, training(bpb=1.14) + SIZES + "  val_bpb: 1.1500\n")) == (
        "last evaluation",
        1.15,
    )


@pytest.mark.parametrize(
    "line, expected",
    [
        ("ppm_mix_bpb:0.829467", ("last evaluation", 0.829467)),
        ("sliding_bpb = 1.12", ("sliding", 1.12)),
        ("pre_quant_bpb: 1.10", ("roundtrip", 1.15)),
        ("quant_cost_bpb: 0.0123", ("roundtrip", 1.15)),
        ("best_val_bpb: 1.10", ("roundtrip", 1.15)),
        ("train_bpb: 1.10", ("roundtrip", 1.15)),
        ("mix progress seq:500/60568 mix_bpb:0.7727", ("roundtrip", 1.15)),
    ],
)
def test_a_key_of_its_own_kind_counts_where_it_is_all_of_the_line(tmp_path, line, expected):
    run = read(tmp_path, training() + SIZES + f"quantized {pair(1.15)}\n{line}\n")
    assert headline(run) == expected
    taken = f"{line}: read as an evaluation, though its key is not val_bpb" in run.remarks
    assert taken == (expected[1] != 1.15 or line.startswith("pre_quant"))


def test_a_result_that_is_passed_over_for_its_name_is_remarked(tmp_path):
    text = training() + SIZES + f"quantized {pair(1.15)}\n"
    run = read(tmp_path, text + f"previous_record {pair(1.08)}\n")
    assert headline(run) == ("roundtrip", 1.15)
    assert any("previous_record val_bpb 1.08" in each for each in run.remarks)
    # What the baseline reaches with something is a result of this run
    assert headline(read(tmp_path, text + f"baseline_with_table {pair(1.08)}\n")) == (
        "last evaluation",
        1.08,
    )


def test_an_adaptation_that_makes_things_worse_is_no_headline_and_is_remarked(tmp_path):
    text = training() + SIZES + f"sliding_window {pair(1.12)}\nsgd_ttt {pair(1.13)}\n"
    run = read(tmp_path, text)
    assert headline(run) == ("sliding", 1.12)
    assert significance.choose_headline([run], "TTT") == "TTT"
    assert any("TTT 1.13 is worse than sliding 1.12" in each for each in run.remarks)


def test_training_before_the_test_text_is_not_test_time_training(tmp_path):
    run = read(
        tmp_path,
        training() + SIZES + f"pre_ttt_sliding_exact {pair(1.12)}\nno-TTT quantized {pair(1.15)}\n",
    )
    assert {stage: score.val_bpb for stage, score in run.packed_scores.items()} == {
        "sliding": 1.12,
        "roundtrip": 1.15,
    }


@pytest.mark.parametrize(
    "line",
    [
        "  ttt_chunk [1271/1893] bpb=1.050000 time=300.0s",
        f"sliding_eval [ 50.0%] 100/200 windows running {pair(1.05)}",
        f"baseline roundtrip {pair(1.05)}",
        "best so far val_bpb: 1.0500",
        "3-seed mean roundtrip val_bpb: 1.0500",
        "target val_bpb:1.0500",
        "val_bpb:enabled tokenizer_kind=sentencepiece",
        "log(f'final_roundtrip val_loss:{loss:.4f} val_bpb:{bpb:.4f}')",
    ],
)
def test_progress_and_numbers_of_others_are_no_scores(tmp_path, line):
    text = training() + SIZES + f"final_int6_roundtrip_exact {pair(1.15)}\n{line}\n"
    run = read(tmp_path, text + f"legal_ttt_exact {pair(1.11)}\n")
    assert {score.val_bpb for score in run.packed_scores.values()} == {1.15, 1.11}


def test_a_second_pair_of_fields_under_another_word_is_not_the_result_of_the_evaluation(tmp_path):
    tail = (
        f"final_int8_zlib_roundtrip_exact {pair(1.15)}\nfinal_int8_zlib_roundtrip_exact sliding "
        f"{pair(1.12, form='val_loss:{} sliding val_bpb:{}')}\n"
    )
    run = read(tmp_path, training() + SIZES + tail)
    assert headline(run) == ("roundtrip", 1.15)
    assert any("'sliding val_bpb'" in remark for remark in run.remarks)
    alone = f"sliding {pair(1.12, form='val_loss:{} sliding val_bpb:{}')}\n"  # a label of its own
    assert headline(read(tmp_path, training() + SIZES + alone)) == ("sliding", 1.12)


def test_two_different_scores_of_one_kind_are_remarked(tmp_path):
    run = read(
        tmp_path, training() + SIZES + f"sliding_64 {pair(1.12)}\nsliding_256 {pair(1.13)}\n"
    )
    assert headline(run) == ("sliding", 1.13)
    assert any("more than once: sliding_64 1.12" in remark for remark in run.remarks)


# --- training, sizes, seeds ----------------------------------------------------------------------


def test_steps_without_the_word_step_and_minutes_are_read(tmp_path):
    text = (
        "  seed: 7\n  ttt_enabled: True\nval_tokens: 40540160\nmodel_params:35943512\n"
        "0/20000 val_loss: 9.0092 val_bpb: 5.3360\n1000/20000 train_loss: 3.0129 train_time: 1.5m "
        "tok/s: 7981133\n"
        f"4000/20000 {pair(1.13, 4, 'val_loss: {} val_bpb: {}')}\n"
        "stopping_early: wallclock_cap train_time: 588138ms step: 4988/20000\n"
        f"pre-quantization post-ema {pair(1.12)}\nCode size (uncompressed): 125671 bytes\n"
        "Code size (compressed): 28320 bytes\nSerialized model quantized+brotli: 15972031 bytes\n"
        f"Total submission size quantized+brotli: 16000351 bytes\nquantized {pair(1.13)}\n"
    )
    run = read(tmp_path, text)
    assert run.train_curve == [(1000, 3.0129)] and [step for step, _ in run.val_curve] == [0, 4000]
    assert (run.seed, run.steps, run.iterations, run.train_time_s) == (7, 4988, 20000, 588.138)
    assert (run.code_bytes, run.artifact_bytes, run.total_bytes) == (28320, 15972031, 16000351)
    assert run.settings == {"model_params": "35943512", "iterations": "20000"}


def test_loss_and_bpb_of_a_training_batch_are_no_validation(tmp_path):
    line = "step    150/200  loss=5.0433  ppl= 155.0  bpb=13.2073  tok/s=2583.1K\n"
    run = read(tmp_path, training() + line + SIZES + f"quantized {pair(1.15)}\n")
    assert [step for step, _ in run.val_curve] == [200] and headline(run) == ("roundtrip", 1.15)


def test_a_page_on_logs_says_that_they_do_not_prove_legality(tmp_path, capsys):
    write_log(tmp_path / "logs", "train_seed1.log", 1.12)
    submission_of(tmp_path, capsys, [tmp_path / "logs"])
    assert (
        "does not show whether an evaluation is legal"
        in (tmp_path / "out" / "results.md").read_text()
    )


def test_sizes_that_stand_in_one_line_are_told_apart(tmp_path):
    text = (
        "Raw model: 85587955 bytes | Code: 70969 bytes | Total: 85658924\n"
        "INT7+zlib model: 15,370,972 bytes | Total submission: 15,441,941 bytes\n"
    )
    run = read(tmp_path, training() + text + f"final_INT7_zlib_roundtrip {pair(1.2, 4)}\n")
    assert (run.code_bytes, run.artifact_bytes, run.total_bytes) == (70969, 15370972, 15441941)
    assert run.scores["roundtrip"].eval_time_s is None


def test_sizes_without_a_unit_are_read_where_code_and_total_stand_together(tmp_path):
    text = "raw:14437775 code:42197 total:14479972\nint8:3554683 code:42197 total:3596880 x:3.5\n"
    run = read(tmp_path, training() + text + f"quantized {pair(1.2)}\n")
    assert (run.code_bytes, run.total_bytes) == (42197, 3596880)


@pytest.mark.parametrize(
    "lines, total, told",
    [
        # 12971408 + 29164 bytes are 13.00 MB, and 12.40 MiB
        (" - model: 12971408 bytes\n - Code: 29164 bytes\n - TOTAL: 13.00 MB\n", 13000572, False),
        (" - model: 12971408 bytes\n - Code: 29164 bytes\n - TOTAL: 12.40 MB\n", 13000572, False),
        (" - model: 12971408 bytes\n - Code: 29164 bytes\n - TOTAL: 13.90 MB\n", None, True),
        ("artifact:15.88MB code:76908\n", None, True),
        ("done | Size 5.64 MB (5,645,856 bytes)\n", 5645856, False),
        ("submission size: 15889999 bytes (15.89 MB)\n", 15889999, False),
    ],
)
def test_a_total_in_mb_counts_only_where_its_bytes_are_told(tmp_path, lines, total, told):
    run = read(tmp_path, training() + lines + f"quantized {pair(1.2)}\n")
    assert run.total_bytes == total
    assert any("in MB only" in each for each in run.remarks) == told


@pytest.mark.parametrize(
    "line, name, seed",
    [
        ("seed:42", "train.log", 42),
        ("  seed: 1", "run.txt", 1),
        ("SEED=7", "x.log", 7),
        ("nothing", "train_seed1234_original.log", 1234),
        ("nothing", "train_seed_42.txt", 42),
        ("nothing", "train_s7.log", 7),
        ("nothing", "train.log", None),
        ("data_seed: 3", "train.log", None),
        ("seed:1337", "train_seed0.log", 0),
    ],
)
def test_the_seed_comes_from_the_log_or_its_name_and_the_name_wins(tmp_path, line, name, seed):
    run = read(
        tmp_path,
        f"{line}\n" + training().partition("\n")[2] + SIZES + f"quantized {pair(1.2)}\n",
        name,
    )
    assert run.seed == seed
    assert any("name says seed 0, its lines say 1337" in each for each in run.remarks) == (
        seed == 0
    )


# --- logs that have no result --------------------------------------------------------------------


@pytest.mark.parametrize(
    "tail, words",
    [
        (
            SIZES,
            "no evaluation of the packed model; validation at step 200, float weights, was "
            "val_bpb 1.14",
        ),
        (
            SIZES + f"quantized {pair(1.15)}\nttt_phased: total_docs:50000\nttp: b1/782 bl:2.1\n",
            "no line tells its score",
        ),
        (
            SIZES
            + f"quantized {pair(1.15)}\nTraceback (most recent call last):\nRuntimeError: CUDA\n",
            "RuntimeError",
        ),
        (
            SIZES
            + f"quantized {pair(1.15)}\nslurmstepd: error: *** JOB 7 CANCELLED AT 10:00 ***\n",
            "CANCELLED",
        ),
        (f"final_eval {pair(1.1)}\n", "no evaluation of the packed model"),
    ],
)
def test_a_log_without_a_final_evaluation_is_named_and_has_no_headline(
    tmp_path, capsys, tail, words
):
    path = tmp_path / "train.log"
    path.write_text(training() + tail)
    assert_refused(run_collect(capsys, path), 3, "none of 1 run(s)", path, words)


def test_an_error_that_the_run_has_overcome_is_no_failure(tmp_path):
    text = (
        training()
        + "Traceback (most recent call last):\nOSError: disk\n"
        + "Resuming from checkpoint ckpt_step100.pt\n"
    )
    assert (
        read(tmp_path, text + training() + SIZES + f"quantized {pair(1.15)}\n").status == "finished"
    )


def test_tokens_right_behind_the_loader_are_read(tmp_path):
    # Bits per token under the name of bits per byte, while the model trains
    other = f"step:200/200 val_loss:{loss_of(1.14):.4f} val_bpb:4.0064 train_time:10000ms\n"
    text = f"val_loader:tokens:62021846\n{training()}{other}{SIZES}final {pair(1.15)}\n"
    run = read(tmp_path, text)
    assert run.tokens == 62021846 and headline(run) == ("last evaluation", 1.15)


def test_an_evaluation_of_a_part_of_the_text_is_refused(tmp_path, capsys):
    path = tmp_path / "train.log"
    other = f"step:200/200 val_loss:{1.004 * loss_of(1.14):.4f} val_bpb:1.1400 train_time:10000ms\n"
    path.write_text(training() + other + SIZES + f"quantized {pair(1.15)}\n")
    assert_refused(run_collect(capsys, path), 3, "validation at step 200", "a part of the text")


def test_validations_on_a_part_are_no_matter_where_the_final_one_is_of_the_canonical_text(tmp_path):
    other = f"step:200/200 val_loss:{1.004 * loss_of(1.14):.4f} val_bpb:1.1400 train_time:10000ms\n"
    text = "val_tokens: 62021632\n" + training() + other + SIZES + f"quantized {pair(1.15)}\n"
    assert read(tmp_path, text).status == "finished"


def test_a_last_line_without_its_end_counts_only_if_it_is_whole(tmp_path):
    text = training() + SIZES + f"quantized {pair(1.15)}\n"
    line = f"quantized_sliding_window {pair(1.12345678)}"
    assert headline(read(tmp_path, text + line)) == ("sliding", 1.12345678)
    for length in range(1, len(line)):
        assert headline(read(tmp_path, text + line[:length])) == ("roundtrip", 1.15)


@pytest.mark.parametrize(
    "data", [b"\x00\x01\xff" * 5000, b"\x89PNG\r\n" + bytes(range(256)) * 40, b"", b"\n" * 9]
)
def test_a_binary_or_empty_file_is_no_log(tmp_path, capsys, data):
    path = tmp_path / "train.log"
    path.write_bytes(data)
    assert_refused(run_collect(capsys, path), 3, path, "no line of the field's log format")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_a_log_in_another_encoding_is_read(tmp_path, encoding):
    path = tmp_path / "train.log"
    path.write_text(training() + SIZES + f"quantized {pair(1.15)}\n", encoding=encoding)
    assert headline(load_run(path)) == ("roundtrip", 1.15)


def test_ends_of_lines_of_other_systems_and_of_progress_bars_are_read(tmp_path):
    path = tmp_path / "train.log"
    text = training() + SIZES + f"10%\r50%\rquantized {pair(1.15)}\n"
    path.write_bytes(text.replace("\n", "\r\n").encode())
    assert headline(load_run(path)) == ("roundtrip", 1.15)


# --- folders of logs -----------------------------------------------------------------------------


def write_log(folder, name, bpb, seed=42, label="quantized_sliding_window"):
    folder.mkdir(exist_ok=True, parents=True)
    (folder / name).write_text(training(seed) + SIZES + f"{label} {pair(bpb)}\n")


def test_a_folder_of_logs_gives_the_mean_over_its_seeds(tmp_path, capsys):
    for seed, bpb in ((42, 1.121), (7, 1.122), (1337, 1.123)):
        write_log(tmp_path / "logs", f"train_seed{seed}.log", bpb, seed)
    (tmp_path / "logs" / "requirements.txt").write_text("torch==2.9\n")
    submission = submission_of(tmp_path, capsys, [tmp_path / "logs"])
    assert submission["val_bpb"] == pytest.approx(1.122) and submission[
        "val_bpb_std"
    ] == pytest.approx(0.001)
    assert (
        sorted(submission["seeds"]) == [7, 42, 1337]
        and submission["score_label"] == "quantized_sliding_window"
    )
    assert (
        "left out, no log of a seed: requirements.txt"
        in (tmp_path / "out" / "results.md").read_text()
    )


def test_logs_of_one_kind_of_evaluation_go_together_whatever_they_call_it(tmp_path, capsys):
    write_log(tmp_path / "logs", "train_seed1.log", 1.12, 1, "final_ttt_lora")
    write_log(tmp_path / "logs", "train_seed2.log", 1.13, 2, "final_int8_ttt_lora")
    submission = submission_of(tmp_path, capsys, [tmp_path / "logs"])
    assert (submission["score_label"], submission["val_bpb"]) == ("TTT", 1.125)


def test_train_log_is_the_run_that_a_folder_of_the_field_submits(tmp_path, capsys):
    for seed, bpb in ((42, 1.121), (7, 1.122), (1337, 1.126)):
        write_log(tmp_path / "logs", f"train_seed{seed}.log", bpb, seed)
    write_log(tmp_path / "logs", "train.log", 1.121, 42)  # a copy: counts once
    submission = submission_of(tmp_path, capsys, [tmp_path / "logs"])
    assert submission["val_bpb"] == 1.121 and len(submission["seed_results"]) == 3
    page = (tmp_path / "out" / "results.md").read_text()
    assert (
        "seed 42: the run that its folder keeps as train.log; mean of 3 seed(s) 1.12300 ± 0.00265"
        in page
    )


def test_repetitions_of_a_seed_count_once_by_their_mean_and_are_remarked(tmp_path, capsys):
    for name, seed, bpb in (
        ("train_seed1_a.log", 1, 1.120),
        ("train_seed1_b.log", 1, 1.122),
        ("train_seed2.log", 2, 1.125),
    ):
        write_log(tmp_path / "logs", name, bpb, seed)
    submission = submission_of(tmp_path, capsys, [tmp_path / "logs"])
    assert submission["val_bpb"] == pytest.approx((1.121 + 1.125) / 2)
    assert sorted(submission["seed_results"]) == ["2", "train_seed1_a", "train_seed1_b"]
    assert (
        "train_seed1_b.log: a repetition of train_seed1_a.log"
        in (tmp_path / "out" / "results.md").read_text()
    )
    files = sorted((tmp_path / "logs").iterdir())
    assert_refused(run_collect(capsys, *files), 2, "two runs of seed 1")


def test_runs_under_headings_in_one_log_are_read_one_by_one(tmp_path, capsys):
    runs = [(1337, 1.120), (7, 1.122)]
    text = "".join(
        f"=== Seed {seed} ===\n{training(seed)}{SIZES}quantized {pair(bpb)}\n" for seed, bpb in runs
    )
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "v6_seed1337_7.log").write_text(text)
    write_log(tmp_path / "logs", "v6_seed42.log", 1.124, 42, "quantized")
    submission = submission_of(tmp_path, capsys, [tmp_path / "logs"])
    assert submission["val_bpb"] == pytest.approx(1.122)
    assert sorted(submission["seeds"]) == [7, 42, 1337]


def test_an_evaluation_in_a_log_of_its_own_belongs_to_the_log_that_trained_its_seed(
    tmp_path, capsys
):
    for seed, bpb in ((1, 1.05), (2, 1.06)):
        write_log(tmp_path / "logs", f"train_seed{seed}.log", 1.15, seed, "quantized")
        (tmp_path / "logs" / f"ttt_seed{seed}.log").write_text(
            f"seed: {seed}\nttt: b1/782 bl:2.4\nquantized_ttt {pair(bpb)}\n"
        )
    submission = submission_of(tmp_path, capsys, [tmp_path / "logs"])
    assert submission["val_bpb"] == pytest.approx(1.055)
    assert submission["bytes_total"] == 15890000 and sorted(submission["seed_results"]) == [
        "1",
        "2",
    ]
    # One that contradicts the training log is of another model
    with open(tmp_path / "logs" / "ttt_seed1.log", "a") as file:
        file.write(f"quantized {pair(1.16)}\n")
    run_collect(capsys, tmp_path / "logs", "--out", tmp_path / "out")
    page = (tmp_path / "out" / "results.md").read_text()
    assert "ttt_seed1.log trained nothing" not in page
    assert "ttt_seed2.log trained nothing" in page


def test_a_newer_version_of_a_log_replaces_the_older_one(tmp_path, capsys):
    for version, bpb in (("v1.9", 1.120), ("v1.10", 1.125)):
        for seed in (1, 2):
            write_log(tmp_path / "logs", f"log_seed{seed}_{version}.txt", bpb, seed)
    submission = submission_of(tmp_path, capsys, [tmp_path / "logs"])
    assert submission["val_bpb"] == 1.125 and sorted(submission["seed_results"]) == ["1", "2"]
    page = (tmp_path / "out" / "results.md").read_text()
    assert "log_seed1_v1.9.txt (an older version)" in page


def test_seeds_whose_logs_differ_in_nothing_but_the_seed_may_lie_far_apart(tmp_path, capsys):
    for seed, bpb in ((1, 1.05), (2, 1.09)):
        write_log(tmp_path / "logs", f"log_seed{seed}.txt", bpb, seed)
    assert submission_of(tmp_path, capsys, [tmp_path / "logs"])["val_bpb"] == pytest.approx(1.07)
    (tmp_path / "logs" / "log_seed2.txt").rename(tmp_path / "logs" / "wide_seed2.txt")
    assert_refused(run_collect(capsys, tmp_path / "logs"), 2, "the logs of a folder differ")


def test_a_configuration_of_another_kind_does_not_hide_the_logs_beside_it(tmp_path, capsys):
    write_log(tmp_path / "logs", "train.log", 1.12)
    (tmp_path / "logs" / "config.json").write_text('{"NUM_LAYERS": 9}')
    assert submission_of(tmp_path, capsys, [tmp_path / "logs"])["val_bpb"] == 1.12
    (tmp_path / "logs" / "config.json").write_text('{"NUM_LAYERS": ')
    assert_refused(run_collect(capsys, tmp_path / "logs"), 3, "config.json", "not readable")


def test_logs_of_a_folder_that_lie_too_far_apart_are_refused(tmp_path, capsys):
    for name, seed, bpb in (("train_seed1_a.log", 1, 1.120), ("train_seed1_b.log", 1, 1.124)):
        write_log(tmp_path / "repeated", name, bpb, seed)
    assert_refused(
        run_collect(capsys, tmp_path / "repeated"), 2, "two logs of seed 1 differ by 0.0040"
    )
    for name, bpb in (("base.log", 1.12), ("wide.log", 1.16)):
        write_log(tmp_path / "ablation", name, bpb, len(name) + round(100 * bpb))
    assert_refused(
        run_collect(capsys, tmp_path / "ablation"), 2, "the logs of a folder differ by 0.0400"
    )


def test_logs_without_a_seed_in_their_name_beside_those_that_have_one_are_left_out(
    tmp_path, capsys
):
    write_log(tmp_path / "logs", "log_seed1.txt", 1.12, 1)
    write_log(tmp_path / "logs", "log_ablation.txt", 1.05, 1)
    submission = submission_of(tmp_path, capsys, [tmp_path / "logs"])
    assert submission["val_bpb"] == 1.12
    assert (
        "left out, no log of a seed: log_ablation.txt"
        in (tmp_path / "out" / "results.md").read_text()
    )


def test_logs_one_level_down_are_found_where_a_folder_has_none_itself(tmp_path, capsys):
    write_log(tmp_path / "record" / "logs", "train_seed1.log", 1.12, 1)
    assert submission_of(tmp_path, capsys, [tmp_path / "record"])["seeds"] == [1]


def test_logs_in_a_folder_per_seed_are_found_where_nothing_lies_above_them(tmp_path, capsys):
    for seed, place in ((1, "runs/seed_1"), (2, "runs/seed_2/logs")):
        write_log(tmp_path / "record" / place, f"run_seed{seed}.log", 1.12, seed)
    assert submission_of(tmp_path, capsys, [tmp_path / "record"])["seeds"] == [1, 2]


def test_a_folder_whose_only_log_is_cut_is_refused_by_name(tmp_path, capsys):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "train_seed3.log").write_text(training(3)[:-30])
    assert_refused(run_collect(capsys, tmp_path / "logs"), 3, "train_seed3.log: unfinished")


def test_logs_of_models_of_different_size_are_refused(tmp_path, capsys):
    for seed in (1, 2):
        write_log(tmp_path / "logs", f"train_seed{seed}.log", 1.12 + seed / 1000, seed)
        with open(tmp_path / "logs" / f"train_seed{seed}.log", "a") as file:
            file.write(f"model_params:{seed}000000\n")
    assert_refused(
        run_collect(capsys, tmp_path / "logs"), 2, "model_params: 1000000 (train_seed1.log)"
    )


# --- what the author of a folder claims ----------------------------------------------------------


def write_claim(folder, val_bpb, key="val_bpb"):
    """A submission.json with the claim as its author rounds it, to four decimals."""
    (folder / "submission.json").write_text(f'{{"name": "new", "{key}": {val_bpb:.4f}}}')


def page_of(tmp_path):
    return (tmp_path / "out" / "results.md").read_text()


def test_the_claim_decides_between_the_evaluations_of_a_log(tmp_path, capsys):
    folder = tmp_path / "logs"
    write_log(folder, "train_seed1.log", 1.12, 1)
    with open(folder / "train_seed1.log", "a") as file:
        file.write(f"legal_ttt {pair(1.13)}\n")
    assert submission_of(tmp_path, capsys, [folder])["val_bpb"] == 1.12
    write_claim(folder, 1.1300)
    assert submission_of(tmp_path, capsys, [folder])["val_bpb"] == 1.13
    assert submission_of(tmp_path, capsys, [folder], "--headline", "sliding")["val_bpb"] == 1.12


def test_of_ablations_in_a_folder_the_claimed_one_is_taken(tmp_path, capsys):
    for name, bpb in (("base", 1.121), ("wide", 1.118), ("deep", 1.124)):
        write_log(tmp_path / "logs", f"{name}.log", bpb)
    write_claim(tmp_path / "logs", 1.118)
    assert submission_of(tmp_path, capsys, [tmp_path / "logs"])["val_bpb"] == 1.118
    assert "is of this log; left out: base.log, deep.log" in page_of(tmp_path)


def test_the_seeds_that_a_claim_is_the_mean_of_are_taken_from_their_folder(tmp_path, capsys):
    for seed, bpb in ((1, 1.121), (2, 1.123)):
        write_log(tmp_path / "record" / "new_logs", f"new_seed{seed}.log", bpb, seed)
        write_log(tmp_path / "record" / "old_logs", f"old_seed{seed}.log", bpb + 0.01, seed)
    assert_refused(run_collect(capsys, tmp_path / "record"), 2, "two logs of seed 1 differ")
    write_claim(tmp_path / "record", 1.122, "mean_val_bpb")
    submission = submission_of(tmp_path, capsys, [tmp_path / "record"])
    assert submission["val_bpb"] == pytest.approx(1.122) and sorted(submission["seeds"]) == [1, 2]
    # The number in the name is known as the seed from the lines
    for place, name in (("new_logs", "new"), ("old_logs", "old")):
        for seed in (1, 2):
            path = tmp_path / "record" / place / f"{name}_seed{seed}.log"
            path.rename(path.with_name(f"{name}_{seed}.txt"))
    renamed = submission_of(tmp_path, capsys, [tmp_path / "record"])
    assert renamed["seed_results"] == submission["seed_results"]


def test_a_claim_of_one_seed_leaves_the_others_in_the_table(tmp_path, capsys):
    for seed, bpb in ((1, 1.121), (2, 1.123), (3, 1.129)):
        write_log(tmp_path / "logs", f"train_seed{seed}.log", bpb, seed)
    write_log(tmp_path / "logs", "train.log", 1.129, 3)  # a copy
    write_claim(tmp_path / "logs", 1.121)
    submission = submission_of(tmp_path, capsys, [tmp_path / "logs"])
    assert submission["val_bpb"] == 1.121 and len(submission["seed_results"]) == 3
    assert "the run that its folder claims in submission.json; mean of 3" in page_of(tmp_path)
    # The mean is of all, whichever is kept as train.log
    write_claim(tmp_path / "logs", 1.12433)
    assert submission_of(tmp_path, capsys, [tmp_path / "logs"])["val_bpb"] == pytest.approx(
        1.1243333, abs=1e-7
    )


def test_a_claimed_size_that_is_not_the_logs_is_remarked(tmp_path, capsys):
    write_log(tmp_path / "logs", "train.log", 1.121)
    for size, told in ((15890000, False), (15890001, True)):
        claim = f'{{"val_bpb": 1.121, "bytes_total": {size}}}'
        (tmp_path / "logs" / "submission.json").write_text(claim)
        assert submission_of(tmp_path, capsys, [tmp_path / "logs"])["bytes_total"] == 15890000
        assert (f"claims {size} bytes in total" in page_of(tmp_path)) == told


def test_a_claim_that_no_log_meets_is_remarked(tmp_path, capsys):
    write_log(tmp_path / "logs", "train.log", 1.12)
    for bpb, words in ((1.1, "no log that was read comes to that"), (1.14, "of float weights")):
        write_claim(tmp_path / "logs", bpb)
        assert submission_of(tmp_path, capsys, [tmp_path / "logs"])["val_bpb"] == 1.12
        assert f"submission.json claims val_bpb {bpb}: " in page_of(tmp_path)
        assert words in page_of(tmp_path)


@pytest.mark.parametrize(
    "name, text, decides",
    [
        ("submission.json", '{"bytes_total": 1\n "val_bpb": 1.1300,\n}', True),
        ("submission.json", '["val_bpb"]', False),
        ("submission.json", '{"val_bpb": null, "val_loss": 1.13}', False),
        ("submission.json", '{"val_bpb": 1.1}', False),  # too coarse to tell anything
        ("README.md", "# Mine\n\n**val_bpb: 1.1300** (one seed)\n| val_bpb | size |\n", True),
        ("README.md", "baseline val_bpb 1.2244, mine val_bpb = 1.1300\n", False),
    ],
)
def test_a_claim_is_read_where_it_is_clear(tmp_path, capsys, name, text, decides):
    folder = tmp_path / "logs"
    write_log(folder, "train_seed1.log", 1.12, 1)
    with open(folder / "train_seed1.log", "a") as file:
        file.write(f"legal_ttt {pair(1.13)}\n")
    (folder / name).write_text(text)
    expected = 1.13 if decides else 1.12
    assert submission_of(tmp_path, capsys, [folder])["val_bpb"] == expected
    assert "comes to that" not in page_of(tmp_path)


def test_two_logs_that_meet_a_claim_alike_are_not_told_apart(tmp_path, capsys):
    for seed, (name, bpb) in enumerate((("base", 1.11), ("wide", 1.11), ("deep", 1.122))):
        write_log(tmp_path / "logs", f"{name}.log", bpb, seed)
    write_claim(tmp_path / "logs", 1.11)
    submission = submission_of(tmp_path, capsys, [tmp_path / "logs"])
    assert submission["val_bpb"] == pytest.approx(1.114)
    assert "which of these logs is not known: base.log, wide.log" in page_of(tmp_path)


def test_a_claim_that_lies_further_down_is_found(tmp_path, capsys):
    folder = tmp_path / "record"
    write_log(folder, "train.log", 1.12, 1)
    write_log(folder / "supplementary", "other_seed1.log", 1.19, 1)
    (folder / "supplementary" / "ttt_seed1.log").write_text(
        f"seed:1\nttt: b1/782 bl:2.4\nquantized_ttt {pair(1.11)}\n"
    )
    write_claim(folder, 1.12)
    assert submission_of(tmp_path, capsys, [folder])["val_bpb"] == 1.12
    write_claim(folder, 1.11)
    submission = submission_of(tmp_path, capsys, [folder])
    assert submission["val_bpb"] == 1.11 and submission["bytes_total"] == 15890000
    assert "ttt_seed1.log trained nothing: its scores are of this seed" in page_of(tmp_path)
    # A log of a whole run takes the place of the one above it
    write_claim(folder, 1.19)
    assert submission_of(tmp_path, capsys, [folder])["val_bpb"] == 1.19
    assert "left out: train.log" in page_of(tmp_path)


def test_logs_further_down_that_cannot_be_read_do_no_harm(tmp_path, capsys):
    write_log(tmp_path / "record", "train.log", 1.12, 1)
    write_log(tmp_path / "record" / "old", "both.log", 1.2, 1)
    with open(tmp_path / "record" / "old" / "both.log", "a") as file:
        file.write("seed:2\n")
    write_claim(tmp_path / "record", 1.11)
    assert submission_of(tmp_path, capsys, [tmp_path / "record"])["val_bpb"] == 1.12


def test_a_list_of_packages_does_not_hide_the_logs_below_it(tmp_path, capsys):
    write_log(tmp_path / "record" / "logs", "train_seed1.log", 1.12, 1)
    (tmp_path / "record" / "requirements.txt").write_text("torch==2.9\n")
    assert submission_of(tmp_path, capsys, [tmp_path / "record"])["seeds"] == [1]


def test_the_headline_of_train_gpt_is_chosen_by_no_number_and_no_claim(tmp_path, capsys):
    path = make_log(tmp_path, ours=True, bpbs={**bpbs_around(1.12), "legal_ttt": 1.2})
    write_claim(tmp_path, 1.13)
    assert significance.choose_headline([load_run(path)]) == "TTT"
    assert submission_of(tmp_path, capsys, [tmp_path])["val_bpb"] == 1.2


# --- runs whose seeds are not known --------------------------------------------------------------


def without_seed_line(text):
    return text.partition("\n")[2]


def test_logs_of_unknown_seeds_are_averaged_only_under_one_name(tmp_path, capsys):
    folder = tmp_path / "logs"
    folder.mkdir()
    for name, bpb in (("train_v1", 1.12), ("train_v2", 1.122)):
        text = without_seed_line(training()) + SIZES + f"quantized {pair(bpb)}\n"
        (folder / f"{name}.txt").write_text(text)
    assert submission_of(tmp_path, capsys, [folder])["val_bpb"] == pytest.approx(1.121)
    (folder / "train_v2.txt").rename(folder / "wide.txt")
    assert_refused(run_collect(capsys, folder), 2, "the seeds of 2 logs are unknown", "wide")


def test_names_that_differ_in_words_are_remarked(tmp_path, capsys):
    write_log(tmp_path / "logs", "base_1.log", 1.12, 1)
    write_log(tmp_path / "logs", "base_2.log", 1.121, 2)
    submission_of(tmp_path, capsys, [tmp_path / "logs"])
    assert "are they of one configuration?" not in page_of(tmp_path)
    write_log(tmp_path / "logs", "wide_3.log", 1.122, 3)
    submission_of(tmp_path, capsys, [tmp_path / "logs"])
    assert "(base_2.log, wide_3.log): are they of one configuration?" in page_of(tmp_path)


def test_runs_whose_names_a_launcher_puts_before_their_lines_are_told_apart(tmp_path, capsys):
    def launched(name, bpb):
        text = without_seed_line(training()) + f"final_roundtrip_exact {pair(bpb)} codec:lzma\n"
        return "".join(f"{name}: {line}\n" for line in text.splitlines()) + f"train {name} rc=0\n"

    path = tmp_path / "sweep.out"
    path.write_text(launched("deep_lr2_s7", 1.15))
    run = load_run(path)
    assert headline(run) == ("roundtrip", 1.15)
    assert (run.name, run.steps, run.seed) == ("deep_lr2_s7", 200, 7)
    path.write_text(launched("deep_lr2", 1.15) + launched("wide_lr2", 1.151))
    assert_refused(run_collect(capsys, path), 2, "the seeds of 2 logs are unknown", "deep_lr")
    # Ranks print the same lines, and their names are of no runs
    path.write_text(launched("rank0", 1.15))
    assert all(run.path == path for run in run_records.read_path(path))


# --- the field's own logs ------------------------------------------------------------------------


@pytest.mark.skipif(not FIELD_LOGS.is_dir(), reason=f"{FIELD_LOGS} is not here")
def test_published_logs_give_the_published_headline_or_are_named(tmp_path, capsys):
    expected = json.loads((FIELD_LOGS / "expected.json").read_text())
    read_right = 0
    for name, published in expected.items():
        code, out, err = run_collect(capsys, FIELD_LOGS / name, "--out", tmp_path)
        if code:
            assert code == 3 and name in err and out == "", (
                f"{name} is refused without being named: {err}"
            )
            continue
        found = json.loads((tmp_path / "submission.json").read_text())
        assert found["val_bpb"] == pytest.approx(published["val_bpb"], abs=6e-4), name
        if published["seeds"]:
            assert sorted(found["seeds"]) == sorted(map(int, published["seeds"])), name
        read_right += 1
    assert read_right >= 21 and len(expected) == 23


@pytest.mark.parametrize(
    "label, stage",
    [
        ("pre_quant", "float weights"),
        ("final_int6_roundtrip", "roundtrip"),
        ("float_roundtrip", "float weights"),
        ("float_legal_ttt", "float weights"),
        ("final_int6_sliding_window", "sliding"),
        ("slot_causal", "SLOT"),
        ("legal_ttt", "TTT"),
        ("legal_ttt_slot_causal", "TTT + SLOT"),
        ("illegal_ttt_slot_published", "TTT + SLOT"),
    ],
)
def test_the_labels_of_train_gpt_have_their_stage(label, stage):
    assert run_records.stage_of(label) == stage


def test_decorations_leave_a_plain_line_as_it_is():
    for line in (
        "0/20000 val_loss: 9.0 val_bpb: 3.6",
        "seed:42",
        "final_int8 val_loss:1.0 val_bpb:1.0",
    ):
        assert logs.DECORATION.match(line).end() == 0
