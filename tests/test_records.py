"""The frontier's presets: settings, exact counts and schedules, by hand from published figures."""

import pytest
import torch
from helpers import preset_config

import train_gpt

# Of the records of 04-05 and 04-09 (8,192 pieces; 11 layers, width 512, 8 and 4 heads).
BOTH = dict(
    vocab_size=8192,
    num_layers=11,
    model_dim=512,
    num_heads=8,
    num_kv_heads=4,
    mlp_mult=4.0,
    rope_dims=16,
    logit_softcap=30.0,
    xsa_last_n=11,
    bigram_vocab_size=0,
    smear_enabled=False,
    gated_attention=False,
    value_residual=False,
    ve_dim=0,
    nfm_enabled=False,
    flow_enabled=False,
    e2e_ttt_enabled=False,
    skip_gates=True,
    num_loops=2,
    train_batch_tokens=786_432,
    train_seq_len=2048,
    eval_seq_len=2048,
    max_wallclock_seconds=600.0,
    shuffle=True,
    embed_lr=0.03,
    embed_wd=0.085,
    scalar_lr=0.02,
    scalar_wd=0.02,
    beta1=0.9,
    beta2=0.95,
    muon_momentum=0.99,
    muon_momentum_warmup_start=0.92,
    muon_momentum_warmup_steps=1500,
    muon_ns_steps=5,
    muon_row_norm=True,
    grad_clip_norm=0.3,
    embed_init_std=0.005,
    quantizer="gptq",
)
OWN = {
    "record_0405": dict(
        loop_start=4,
        loop_end=5,
        loop_at=0.5,
        parallel_last_n=0,
        qk_gain_init=4.0,
        matrix_lr=0.02,
        muon_wd=0.085,
        ema_decay=0.997,
        warmdown_frac=0.667,
        ttt_enabled=False,
    ),
    "record_0409": dict(
        loop_start=3,
        loop_end=5,
        loop_at=0.35,
        parallel_last_n=4,
        qk_gain_init=5.25,
        matrix_lr=0.022,
        muon_wd=0.095,
        ema_decay=0.9965,
        warmdown_frac=0.72,
        ttt_enabled=True,
        ttt_lr=0.005,
        ttt_momentum=0.9,
        ttt_epochs=3,
        ttt_chunk_tokens=32_768,
        ttt_freeze_blocks=0,
        ttt_grad_clip=1.0,
    ),
}


@pytest.mark.parametrize("name", OWN)
def test_a_record_has_its_published_settings(name):
    config = preset_config(name).as_dict()
    expected = {**BOTH, **OWN[name]}
    assert {field: config[field] for field in expected} == expected


def count(name):
    with torch.device("meta"):
        model = train_gpt.GPT(preset_config(name))
    return sum(parameter.numel() for parameter in model.parameters())


def test_a_record_has_its_published_number_of_parameters():
    matrices = 11 * (2 * 512**2 + 2 * 512 * 256 + 2 * 512 * 2048)
    vectors = 11 * (8 + 512 + 512 + 1024)
    assert count("record_0409") == 8192 * 512 + matrices + vectors + 8 * 2 * 512 == 35_944_536
    assert count("record_0405") == 8192 * 512 + matrices + vectors + 7 * 2 * 512 == 35_943_512


def test_our_presets_have_the_parameters_that_the_readme_says():
    # Per layer 8 heads x 12 gate inputs; once the smear gate's 12 inputs and its strength.
    gates = 11 * 8 * 12 + 12 + 1
    assert count("frontier_8192") == 35_944_536 + gates == 35_945_605
    assert count("frontier_1024") == 32_865_436


# Step 10,000 of 20,000, or half of the 600 s, and so on: (share of the run, learning-rate scale).
SCHEDULE = [(0.0, 1.0), (0.28, 1.0), (0.46, 0.75), (0.64, 0.5), (0.82, 0.25), (1.0, 0.0)]


@pytest.mark.parametrize("share, scale", SCHEDULE)
def test_the_schedule_of_record_0409_with_a_cap_and_without(share, scale):
    # With gptq the cap leaves room for the quantiser: tests/test_quantisation.py.
    capped = preset_config("record_0409", quantizer="lite")
    assert train_gpt.lr_scale(capped, 4000, 600.0 * share) == pytest.approx(scale, abs=1e-6)
    free = preset_config("record_0409", max_wallclock_seconds=0.0)
    assert train_gpt.lr_scale(free, round(20_000 * share)) == pytest.approx(scale, abs=1e-6)
