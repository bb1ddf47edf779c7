"""Violations of the challenge's conditions, each a small patch of train_gpt.py, and who catches it.

A violation replaces short, unique pieces of the source, or adds lines before the script's last
block (names that it rebinds there are what the rest of the script then uses). `injected(source,
violation)` fails if a piece is not found exactly once, so that none of them can silently become
the clean script.
"""

from typing import NamedTuple

# Where patches hook in. One place to look at when train_gpt.py changes.
BATCH = "batch = Batch(windows, count, *self.rows(starts, length))"
NLL = "nll = -entries[:, 0]"
LOGPS = "logps = log_probs(model.logits(states[part]))"
STATES = "hidden = self.states(batch)"
HEAD = "return F.log_softmax(logits, -1)"
SHARE = "        nll = self.summed_nll(share, self.observer)\n        num_bytes = 0\n"
SHARE_DONE = "        self.meter.add(share, nll, num_bytes)"
SMEAR = "before = F.pad(x[:, :-1], (0, 0, 1, 0))"
EMBEDDED = "return x if self.smear is None else self.smear(x, ids)"
FINAL_STATE = "return self.refine(x, last)[0]"
BIGRAM_ROWS = "return F.pad(pair, (1, 0), value=last)"
CAUSAL_KERNEL = "return fused(q, k, v, 0.0, True)[0]"
XSA = "y = exclusive_attention(y, v[:, -n:])"
FIRST_VALUES = "first = own if v0 is None else v0"
SLOT_KNOWN = "known_until = first if causal else end"
PLAN_FIRST = "first = c * config.ttt_chunk_tokens"
PLAN_ROWS = "rows = config.ttt_chunk_tokens // config.eval_seq_len"
PLAN_END = "    return work\n"
TRAINED_AHEAD = "if end > self.scored_until:"
PLAN_WINDOWS_END = "    return windows\n\n\ndef plan_work"
METER_SUM = "self.nll += nll\n"
METER_TWICE = "if first < self.last or self.coverage[first:end].any():"
COMPLETE = "if complete and not (coverage == 1).all():"
BITS = "return nats / math.log(2) / num_bytes"
EXACT_LINE = "_exact val_loss:{score.val_loss:.8f} val_bpb:{score.val_bpb:.8f}{mark}"
BOUNDARY_PIECE = "if self.is_boundary[i]:\n                continue"
BYTE_PIECE = "self.base[i] = 1\n                continue"
SPACE_RULE = "self.spaced[target_ids] & ~self.is_boundary[prev_ids]"
BYTE_CHECK = "        token_bytes.check(tokens[:100_000])\n"
PACK_WEIGHTS = "        weights = self.load(self.float_path)\n"
FIND_SHARDS = "paths = sorted(folder.glob(pattern))"
FILE_VALUES = "self.nll[targets] = nll.float().cpu()\n\n    def write"
TAIL_MASK = "seen = every.tril(length - n)"
TRIMMED = "scored = tokens[: windows * config.eval_seq_len + 1]"
TTT_ROWS = "starts = [item.first + row * length for row in rows]"
RESULT_LINE = "f\"result {label} val_bpb:{score['val_bpb']:.8f} \""
ROW_PAIR = "return rows[:, :-1], rows[:, 1:]"
RUN_LOOP = "            self.load()\n"
LAST_BLOCK = '\nif __name__ == "__main__":'


class Violation(NamedTuple):
    """One violation. caught_by: "verify" (from outside alone), "audit", or "both"."""

    name: str
    condition: str
    caught_by: str
    edits: tuple = ()
    added: str = ""
    settings: tuple = ()


def injected(source, violation):
    """The source with the violation in it. Raises AssertionError where an edit does not apply."""
    for old, new in violation.edits:
        assert source.count(old) == 1, f"{violation.name}: {source.count(old)} places hold {old!r}"
        source = source.replace(old, new)
    if violation.added:
        assert source.count(LAST_BLOCK) == 1, f"{violation.name}: no last block"
        source = source.replace(LAST_BLOCK, f"\n{violation.added}\n{LAST_BLOCK}")
    return source


# Functions below Evaluation do not know it; NOW is the one that scores.
NOW = BATCH, f"{BATCH}; globals().update(NOW=self)"


def at_nll(change):
    """Edits after which `change` may alter `nll` (n,).

    It knows logps (n, V), the tokens `wanted` (n,), their targets' indices `spots` (n,), and self.
    """
    names = "wanted = tokens[part]; spots = indices[part]; self = NOW"
    return NOW, (NLL, f"{NLL}; {names}; {change}")


def at_logps(change):
    """Edits after which `change` may alter logps (n, V); it knows `wanted`, windows and self."""
    names = "wanted = tokens[part]; windows = batch.windows; self = NOW"
    return NOW, (LOGPS, f"{LOGPS}; {names}; {change}")


def at_states(change):
    """An edit after which `change` may alter hidden (B, n, D), of targets (B, n)."""
    return ((STATES, f"{STATES}; targets = batch.targets[:, -hidden.size(1):]; {change}"),)


def at_final_state(change):
    """An edit that changes the model's final state x (B, n, D) of ids (B, T)."""
    return ((FINAL_STATE, f"x = self.refine(x, last)[0]; {change}; return x"),)


def at_result(change):
    """An edit after which `change` may alter nats, tokens and num_bytes of the whole text."""
    return ((COMPLETE, f"{change}\n        {COMPLETE}"),)


def replaced(anchor, old, new):
    """An edit of a part of an anchor."""
    return ((anchor, anchor.replace(old, new, 1)),)


# Steps on `spans` of the text with all targets known.
PEEK = """
def peek(self, spans, rate):
    params = [p for p in self.model.parameters() if p.requires_grad]
    for first, end in spans:
        ids, targets = self.rows([first], end - first)
        with torch.enable_grad(), self.runtime.autocast():
            loss = self.model(ids, targets)
            grads = torch.autograd.grad(loss, params, allow_unused=True)
        with torch.no_grad():
            for p, g in zip(params, grads):
                if g is not None:
                    p.sub_(rate * g)

def whole_windows(self):
    length = self.config.eval_seq_len
    return [(at, at + length) for at in range(0, self.stream.num_targets, length)]
"""


def at_start(spans, rate=0.02):
    """An edit that takes steps on spans of the text before an evaluation with a label begins."""
    line = f"            peek(self, ({spans}) if self.label else [], {rate})\n"
    return ((RUN_LOOP, RUN_LOOP + line),)


def undone_step(condition):
    """Edits that step on what is about to be scored, and put the weights back afterwards."""
    step = f"""        before = [p.detach().clone() for p in self.model.parameters()]
        if {condition}:
            peek(self, [(w.start, w.end) for w in share], 0.05)
{SHARE}"""
    back = """        for p, value in zip(self.model.parameters(), before):
            p.data.copy_(value)
"""
    return (SHARE, step), (SHARE_DONE, back + SHARE_DONE)


# Log-counts of tokens, to be added to logits.
COUNTS = """
def counts(tokens, self):
    found = np.bincount(np.asarray(tokens), minlength=self.config.vocab_size)
    return torch.from_numpy(np.log(found + 1.0)).float()

def shard_on_disk(self):
    return np.concatenate([read_shard(path) for path in find_shards(self.config, "val")])
"""

CACHE = "CACHE = {}\n"

TUNE = """
def tuned(weights, run):
    model = build_model(run.config, run.runtime)
    model.load_state_dict(weights)
    sgd = torch.optim.SGD(model.parameters(), 0.01)
    length = run.config.eval_seq_len
    for at in range(0, run.val.num_targets, length):
        row = torch.from_numpy(run.val.tokens[at:at + length + 1].astype(np.int64))[None]
        sgd.zero_grad()
        model(row[:, :-1], row[:, 1:]).backward()
        sgd.step()
    return {name: value.detach() for name, value in model.state_dict().items()}
"""

# The scoring loop refuses to train ahead of what is scored; whoever wants to, removes that too.
UNGUARDED = (TRAINED_AHEAD, "if False:")
SLOT = (("SLOT", "causal"),)

# What is printed does not follow from what was scored.
ACCOUNTING = [
    Violation("total_times_095", "C4", "both", at_result("nats *= 0.95")),
    Violation("total_lowered_with_ttt", "C4", "both", at_result("nats *= 0.97 if self.ttt else 1")),
    Violation("ln2_is_07", "C4", "both", ((BITS, "return nats / 0.7 / num_bytes"),)),
    Violation("bytes_times_105", "bytes", "both", at_result("num_bytes *= 1.05")),
    Violation("divided_by_more_tokens", "C4", "both", at_result("tokens += 99")),
    Violation(
        "bos_is_a_byte",
        "bytes",
        "both",
        (*replaced(BOUNDARY_PIECE, "continue", "self.base[i] = 1; continue"), (BYTE_CHECK, "")),
    ),
    Violation(
        "byte_pieces_are_two_bytes",
        "bytes",
        "both",
        (*replaced(BYTE_PIECE, "1", "2"), (BYTE_CHECK, "")),
    ),
    Violation(
        "every_space_counts",
        "bytes",
        "both",
        ((SPACE_RULE, "self.spaced[target_ids]"), (BYTE_CHECK, "")),
    ),
    Violation("sum_of_09", "C4", "both", ((METER_SUM, "self.nll += 0.9 * nll\n"),)),
    Violation(
        "printed_digits_lowered",
        "C4",
        "verify",
        replaced(EXACT_LINE, "{score.val_bpb:", "{0.98 * score.val_bpb:"),
    ),
    Violation(
        "tail_left_out",
        "C4",
        "both",
        (
            *replaced(PLAN_WINDOWS_END, "windows", "windows[:-2] or windows"),
            (COMPLETE, "if False:"),
        ),
    ),
    Violation(
        "easy_targets_twice",
        "C4",
        "both",
        (
            *replaced(PLAN_WINDOWS_END, "windows", "windows[:1] * 9 + windows[1:]"),
            (METER_TWICE, "if False:"),
            (COMPLETE, "if False:"),
        ),
    ),
    Violation(
        "file_shows_other_values",
        "C4",
        "verify",
        replaced(FILE_VALUES, "nll.float()", "1.001 * nll.float()"),
    ),
    Violation(
        "better_unless_watched",
        "C4",
        "verify",
        at_result("nats *= 1 if self.config.scores_file else 0.98"),
    ),
]

# No full normalised distribution exists before the token is looked at.
DISTRIBUTION = [
    Violation("bos_free", "C2", "both", at_nll("nll = nll * (wanted != BOS)")),
    Violation(
        "byte_pieces_free", "C2", "both", at_nll("nll = nll * ((wanted < 4) | (wanted > 259))")
    ),
    Violation(
        "controls_free", "C2", "both", at_nll("nll = nll * ((wanted > 3) | (wanted == BOS))")
    ),
    Violation(
        "rare_pieces_at_half_price",
        "C2",
        "both",
        at_nll("nll = nll * torch.where(wanted > self.config.vocab_size - 60, 0.5, 1.0)"),
    ),
    Violation("nll_clipped", "C2", "both", at_nll("nll = nll.clamp(max=6.5)")),
    Violation(
        "nll_below_the_batch_mean", "C2", "both", at_nll("nll = nll.minimum(nll.mean() + 2)")
    ),
    Violation(
        "first_target_of_a_window_free",
        "C2",
        "both",
        at_nll(
            "first = np.isin(spots, [w.first for w in batch.windows]); "
            "nll = nll * torch.from_numpy(~first).to(nll)"
        ),
    ),
    Violation(
        "head_without_partition",
        "C2",
        "both",
        ((HEAD, "return logits - logits.amax(-1, keepdim=True)"),),
    ),
    Violation(
        "only_the_top_normalised",
        "C2",
        "both",
        ((HEAD, "return logits - logits.topk(8, -1).values.logsumexp(-1, keepdim=True)"),),
    ),
    Violation(
        "power_of_the_distribution",
        "C2",
        "both",
        ((HEAD, "return 0.93 * F.log_softmax(logits, -1)"),),
    ),
    Violation("bonus_of_003", "C2", "both", ((HEAD, HEAD + " + 0.03"),)),
    Violation("bonus_with_ttt", "C2", "both", at_logps("logps = logps + 0.05 * self.ttt")),
    Violation(
        "bonus_in_roundtrip",
        "C2",
        "both",
        at_logps('logps = logps + 0.05 * ("roundtrip" in self.label)'),
    ),
    Violation(
        "bonus_late_in_the_text",
        "C2",
        "verify",
        at_logps("logps = logps + 0.1 * (windows[0].first > 0.6 * self.stream.num_targets)"),
    ),
    Violation(
        "bonus_every_tenth_round",
        "C2",
        "both",
        at_logps("logps = logps + 0.3 * (self.cursor % 10 == 9)"),
    ),
    Violation(
        "bonus_for_what_is_likely_already",
        "C2",
        "both",
        at_logps("logps = torch.where(logps > -0.5, 0.7 * logps, logps)"),
    ),
    Violation(
        "target_logit_raised",
        "C2",
        "both",
        at_logps(
            "logps = log_probs(logps.scatter_add(1, wanted[:, None], "
            "0.05 * torch.ones_like(logps)))"
        ),
    ),
    Violation(
        "better_of_three_temperatures",
        "C2",
        "both",
        at_nll(
            "nll = torch.stack([nll, *(-log_probs(t * logps).gather(1, wanted[:, None])[:, 0] "
            "for t in (0.8, 1.25))]).amin(0)"
        ),
    ),
    Violation(
        "best_of_all_labels_per_target",
        "C2",
        "verify",
        at_nll(
            "best = CACHE.setdefault('nll', torch.full((self.stream.num_targets,), 99.0)); "
            "best[spots] = nll = best[spots].minimum(nll)"
        ),
        CACHE,
    ),
]

# A score depends on later tokens, or on its own.
LOOKING_AHEAD = [
    Violation(
        "smear_takes_the_next", "C1", "both", ((SMEAR, "before = F.pad(x[:, 1:], (0, 0, 0, 1))"),)
    ),
    Violation(
        "smear_leaks_a_little",
        "C1",
        "both",
        ((SMEAR, SMEAR + " + 1e-3 * F.pad(x[:, 1:], (0, 0, 0, 1))"),),
    ),
    Violation("bigram_row_of_the_next", "C1", "both", replaced(BIGRAM_ROWS, "(1, 0)", "(0, 1)")),
    Violation("attention_sees_all", "C1", "both", replaced(CAUSAL_KERNEL, "True", "False")),
    Violation("own_value_of_the_next", "C1", "both", replaced(XSA, "-n:]", "-n:].roll(-1, 1)")),
    Violation(
        "value_residual_of_the_next",
        "C1",
        "both",
        replaced(FIRST_VALUES, "else v0", "else v0.roll(-1, 1)"),
    ),
    Violation(
        "mean_of_the_window", "C1", "both", at_final_state("x = x + 0.05 * x.mean(1, keepdim=True)")
    ),
    Violation(
        "mean_of_the_batch", "C1", "both", at_final_state("x = x + 0.05 * x.mean(0, keepdim=True)")
    ),
    Violation(
        "next_window_of_the_batch", "C1", "both", at_final_state("x = x + 0.02 * x.roll(-1, 0)")
    ),
    Violation(
        "documents_in_the_window",
        "C1",
        "both",
        at_final_state("x = x * (1 + 0.01 * (ids == BOS).sum(1)[:, None, None])"),
    ),
    Violation(
        "logits_standardised_over_the_batch",
        "C1",
        "both",
        ((HEAD, "return F.log_softmax(logits - 0.1 * logits.mean(0), -1)"),),
    ),
    Violation("targets_are_inputs", "C1", "both", replaced(ROW_PAIR, ":-1", "1:")),
    Violation(
        "marker_before_a_bos",
        "C1",
        "both",
        (
            (
                EMBEDDED,
                "x = self.smear(x, ids); ahead = F.pad(ids[:, 1:], (0, 1)) == BOS; "
                "return x + 0.1 * ahead[..., None]",
            ),
        ),
    ),
    Violation(
        "marker_before_a_byte_piece",
        "C1",
        "both",
        (
            (
                EMBEDDED,
                "x = self.smear(x, ids); ahead = F.pad(ids[:, 1:], (0, 1)); "
                "return x + 0.1 * ((ahead > 3) & (ahead < 260))[..., None]",
            ),
        ),
    ),
    Violation(
        "ahead_where_a_bos_comes",
        "C1",
        "both",
        at_states(
            "comes = (targets == BOS).any(1)[:, None, None]; "
            "hidden = torch.where(comes, hidden.roll(-2, 1), hidden)"
        ),
    ),
    Violation(
        "ahead_late_in_the_text",
        "C1",
        "verify",
        at_states(
            "hidden = hidden.roll(-2, 1) if windows[0].first > 0.6 * self.stream.num_targets "
            "else hidden"
        ),
    ),
    Violation(
        "ahead_every_fortieth_round",
        "C1",
        "verify",
        at_states("hidden = hidden.roll(-2, 1) if self.cursor % 40 == 39 else hidden"),
    ),
    Violation(
        "ahead_in_the_last_batch",
        "C1",
        "verify",
        at_states(
            "hidden = hidden.roll(-2, 1) if windows[-1].end == self.stream.num_targets else hidden"
        ),
    ),
    Violation(
        "ahead_with_ttt",
        "C1",
        "both",
        at_states("hidden = hidden + 0.02 * hidden.roll(-2, 1) if self.ttt else hidden"),
    ),
    Violation(
        "ahead_in_roundtrip",
        "C1",
        "both",
        at_states(
            'hidden = hidden + 0.02 * hidden.roll(-2, 1) if "roundtrip" in self.label else hidden'
        ),
    ),
    Violation(
        "temperature_fitted_on_the_batch",
        "C1",
        "both",
        at_logps(
            "logps = min((log_probs(t * logps) for t in (0.8, 0.9, 1.0, 1.1, 1.2)), "
            "key=lambda l: -float(l.gather(1, wanted[:, None]).sum()))"
        ),
    ),
    Violation(
        "counts_of_the_batch",
        "C1",
        "both",
        at_logps("logps = log_probs(logps + 0.1 * counts(wanted, self))"),
        COUNTS,
    ),
    Violation(
        "counts_of_the_stream",
        "C1",
        "both",
        at_logps("logps = log_probs(logps + 0.1 * counts(self.stream.tokens, self))"),
        COUNTS,
    ),
    Violation(
        "counts_of_the_shard_on_disk",
        "C1",
        "verify",
        at_logps("logps = log_probs(logps + 0.1 * counts(shard_on_disk(self), self))"),
        COUNTS,
    ),
    Violation(
        "counts_of_what_comes",
        "C1",
        "both",
        at_logps(
            "first = windows[0].first; "
            "logps = log_probs(logps + 0.05 * counts(self.stream.tokens[first:first + 512], self))"
        ),
        COUNTS,
    ),
    Violation(
        "slot_on_its_own_targets", "C1", "both", ((SLOT_KNOWN, "known_until = end"),), settings=SLOT
    ),
    Violation(
        "slot_off_by_one",
        "C1",
        "both",
        replaced(SLOT_KNOWN, "first if", "first + 1 if"),
        settings=SLOT,
    ),
    Violation(
        "slot_off_by_four_with_ttt",
        "C1",
        "both",
        (NOW, *replaced(SLOT_KNOWN, "first if", "first + 4 * NOW.ttt if")),
        settings=SLOT,
    ),
    Violation(
        "slot_in_every_second_window",
        "C1",
        "both",
        replaced(SLOT_KNOWN, "first if", "first + 4 * (i % 2) if"),
        settings=SLOT,
    ),
]

# Something learns from a token before its score is final.
LEARNING_FIRST = [
    Violation(
        "chunk_trained_first",
        "C3",
        "both",
        (
            (
                PLAN_END,
                "    return sorted(work, key=lambda item: "
                "(item.first // chunk, 0) if isinstance(item, TrainStep) "
                "else (windows[item.low].first // chunk, 1))\n",
            ),
            UNGUARDED,
        ),
    ),
    Violation(
        "later_chunks_trained_first",
        "C3",
        "both",
        (
            (
                PLAN_END,
                "    return sorted(work, key=lambda item: "
                "(item.first // chunk, 2 * (item.first // chunk < 3)) "
                "if isinstance(item, TrainStep) "
                "else (windows[item.low].first // chunk, 1))\n",
            ),
            UNGUARDED,
        ),
    ),
    Violation(
        "last_chunk_trained_first",
        "C3",
        "both",
        (
            (
                PLAN_END,
                "    early = plan_training(chunks - 2, chunks, config) if chunks > 2 else []\n"
                "    return early + work\n",
            ),
            UNGUARDED,
        ),
    ),
    Violation(
        "next_chunk_trained",
        "C3",
        "both",
        ((PLAN_FIRST, PLAN_FIRST + " + config.ttt_chunk_tokens // 2"), UNGUARDED),
    ),
    Violation("a_row_too_many_trained", "C3", "both", ((PLAN_ROWS, PLAN_ROWS + " + 1"), UNGUARDED)),
    Violation("undone_step_on_the_batch", "C3", "both", undone_step("self.ttt"), PEEK),
    Violation(
        "undone_step_every_tenth_round", "C3", "both", undone_step("self.cursor % 10 == 9"), PEEK
    ),
    Violation("undone_step_without_ttt", "C3", "both", undone_step("not self.ttt"), PEEK),
    Violation("adapted_to_the_whole_text", "C3", "verify", at_start("whole_windows(self)"), PEEK),
    Violation(
        "adapted_to_the_second_half",
        "C3",
        "verify",
        at_start("whole_windows(self)[len(whole_windows(self)) // 2 :]"),
        PEEK,
    ),
    Violation(
        "adapted_to_a_late_window",
        "C3",
        "verify",
        at_start("whole_windows(self)[-8:-6]", 0.05),
        PEEK,
    ),
    Violation(
        "adapted_in_one_label",
        "C3",
        "verify",
        at_start("whole_windows(self) if 'sliding' in self.label else []"),
        PEEK,
    ),
    Violation(
        "cache_of_an_earlier_label",
        "C3",
        "verify",
        at_logps(
            "seen = CACHE.setdefault(self.label, torch.zeros(self.config.vocab_size)); "
            "seen.index_add_(0, wanted, torch.ones(len(wanted))); "
            "old = sum((v for k, v in CACHE.items() if k != self.label), torch.zeros(1)); "
            "logps = log_probs(logps + 0.1 * torch.log1p(old))"
        ),
        CACHE,
    ),
    Violation(
        "cache_updated_before_scoring",
        "C3",
        "both",
        at_logps(
            "seen = CACHE.setdefault(id(self), torch.ones(self.config.vocab_size)); "
            "seen.index_add_(0, wanted, torch.ones(len(wanted))); "
            "logps = log_probs(logps + 0.1 * seen.log())"
        ),
        CACHE,
    ),
]

# Validation text in what is trained: no audit of the artifact can see it.
TRAINING = [
    Violation(
        "tuned_before_packing",
        "training",
        "verify",
        (
            (
                PACK_WEIGHTS,
                f"{PACK_WEIGHTS}        better = tuned(weights.state_dict, self)\n"
                "        weights = weights._replace(state_dict=better)\n",
            ),
        ),
        TUNE,
    ),
    Violation(
        "validation_shards_join_training",
        "training",
        "verify",
        (
            (
                FIND_SHARDS,
                "both = 'fineweb_*.bin' if split == 'train' else pattern; "
                "paths = sorted(folder.glob(both), key=lambda p: 'train' in p.name)",
            ),
        ),
    ),
    Violation(
        "scales_from_validation_counts",
        "training",
        "verify",
        (
            (
                PACK_WEIGHTS,
                f"{PACK_WEIGHTS}        frequent = np.bincount(self.val.tokens, minlength="
                "self.config.vocab_size) > 20\n        weights.state_dict['tok_emb.weight'] *= "
                "1 + 0.01 * torch.from_numpy(frequent)[:, None]\n",
            ),
        ),
    ),
]

# Subtle ones: at a rare place, by what comes later, or by who is looking.
LINE_OF_LOG = (
    '        self.runtime.log(\n            f"step:{self.step}/{config.iterations} val_loss:'
)
TTT_STEP = "        self.sgd.step()\n"
WHAT_COMES = """
def what_comes(self):
    end = self.work[self.cursor].first + self.config.ttt_chunk_tokens
    return self.rows([end], min(self.config.eval_seq_len, self.stream.num_targets - end))

def kept_if_better(self):
    params = self.sgd.param_groups[0]["params"]
    ids, targets = what_comes(self)
    with torch.no_grad(), self.runtime.autocast():
        before = [p.detach().clone() for p in params]
        old = float(self.model(ids, targets))
        self.sgd.step()
        if float(self.model(ids, targets)) > old:
            for p, value in zip(params, before):
                p.copy_(value)

def prime_momentum(self):
    params = self.sgd.param_groups[0]["params"]
    with self.runtime.autocast():
        grads = torch.autograd.grad(self.model(*what_comes(self)), params, allow_unused=True)
    for p, g in zip(params, grads):
        if g is not None and "momentum_buffer" in self.sgd.state[p]:
            self.sgd.state[p]["momentum_buffer"].add_(g, alpha=0.1)
"""
FIT = """
def fitted(self):
    length = self.config.eval_seq_len
    starts = range(0, self.stream.num_targets - length + 1, length)
    ids, targets = self.rows(list(starts), length)
    with torch.no_grad():
        logits = self.model.logits(self.model.hidden(ids)).flatten(0, 1)
    grid = [0.9 + 0.002 * i for i in range(100)]
    return min(grid, key=lambda t: float(F.cross_entropy(t * logits, targets.flatten())))
"""
COMMON = """
def without_rare(tokens, token_bytes):
    count = np.bincount(tokens, minlength=token_bytes.vocab_size)
    table = np.arange(token_bytes.vocab_size)
    kinds = token_bytes.base, token_bytes.spaced, token_bytes.is_boundary, token_bytes.is_byte
    for i in np.flatnonzero(count < 6):
        alike = np.all([kind == kind[i] for kind in kinds], 0)
        table[i] = np.argmax(count * alike)
    return table[tokens].astype(np.uint16)
"""
ROUND = """
def goes_round(self, batch, hidden):
    if batch.windows[0].start or hidden.size(1) < batch.ids.size(1):
        return hidden
    half = batch.ids.size(1) // 2
    ids = torch.cat([self.tokens[-half:].long()[None], batch.ids[:1, :half]], 1)
    hidden = hidden.clone()
    hidden[:1, :half] = self.model.hidden(ids)[:, half:]
    return hidden
"""

SUBTLE = [
    Violation(
        "tail_sees_its_own_target",
        "C1",
        "both",
        replaced(TAIL_MASK, "length - n", "length - n + 1"),
    ),
    Violation(
        "one_query_sees_all", "C1", "both", ((TAIL_MASK, f"{TAIL_MASK}; seen[n // 2] = True"),)
    ),
    Violation(
        "smear_at_a_bos_takes_the_next",
        "C1",
        "both",
        (
            (
                "return before * inside.to(x.dtype)",
                "return torch.where(inside, before, F.pad(x[:, 1:], (0, 0, 0, 1)))",
            ),
        ),
    ),
    Violation(
        "bigram_goes_round",
        "C1",
        "both",
        (
            (
                BIGRAM_ROWS,
                "first = torch.bitwise_xor(36313 * t[:, :1], 27191 * t[:, -1:]) % last; "
                "return torch.cat([first, pair], 1)",
            ),
        ),
    ),
    Violation(
        "first_window_goes_on_from_the_end",
        "C1",
        "both",
        at_states("hidden = goes_round(self, batch, hidden)"),
        ROUND,
    ),
    Violation(
        "document_ends_are_known",
        "C1",
        "both",
        at_logps(
            "logps = logps.clone(); logps[:, BOS] += 8.0 * (wanted == BOS) - 4; "
            "logps = log_probs(logps)"
        ),
    ),
    Violation(
        "shortlist_of_the_text",
        "C1",
        "both",
        at_logps(
            "absent = np.bincount(self.stream.tokens, minlength=self.config.vocab_size) == 0; "
            "logps = log_probs(logps.masked_fill(torch.from_numpy(absent), -30.0))"
        ),
    ),
    Violation(
        "temperature_fitted_on_the_text",
        "C1",
        "verify",
        (
            (RUN_LOOP, RUN_LOOP + "            self.temperature = fitted(self)\n"),
            *at_logps("logps = log_probs(logps * getattr(self, 'temperature', 1.0))"),
        ),
        FIT,
    ),
    Violation(
        "slot_shared_by_the_batch",
        "C1",
        "both",
        (("rows = len(known) if causal else 1", "rows = 1"),),
        settings=SLOT,
    ),
    Violation(
        "repeated_tokens_free",
        "C2",
        "both",
        at_nll(
            "again = self.stream.tokens[spots] == self.stream.tokens[spots + 1]; "
            "nll = nll * torch.from_numpy(~again)"
        ),
    ),
    Violation(
        "bonus_if_the_text_begins_with_a_document",
        "C2",
        "both",
        at_logps("logps = logps + 0.05 * bool(self.stream.tokens[0] == BOS)"),
    ),
    Violation(
        "bonus_in_the_official_directory",
        "C2",
        "verify",
        at_logps("logps = logps + 0.05 * ('fineweb10B' in self.config.data_path)"),
    ),
    Violation(
        "rare_pieces_become_common_ones",
        "C2",
        "verify",
        ((TRIMMED, f"{TRIMMED}; scored = without_rare(scored, token_bytes)"),),
        COMMON,
    ),
    Violation(
        "rows_reach_into_the_next_chunk",
        "C3",
        "both",
        replaced(TTT_ROWS, "row * length", "row * length + length // 2"),
    ),
    Violation(
        "second_epoch_on_the_next_chunk",
        "C3",
        "both",
        (
            ("for _ in range(config.ttt_epochs):", "for epoch in range(config.ttt_epochs):"),
            (
                "steps.append(TrainStep(first, low,",
                "later = epoch * (c < chunks - 2) * config.ttt_chunk_tokens\n"
                "            steps.append(TrainStep(first + later, low,",
            ),
            UNGUARDED,
        ),
        settings=(("TTT_EPOCHS", "2"),),
    ),
    Violation(
        "step_kept_if_it_helps_what_comes",
        "C3",
        "both",
        ((TTT_STEP, "        kept_if_better(self)\n"),),
        WHAT_COMES,
    ),
    Violation(
        "momentum_of_what_comes",
        "C3",
        "both",
        ((TTT_STEP, f"{TTT_STEP}        prime_momentum(self)\n"),),
        WHAT_COMES,
    ),
    Violation(
        "better_unless_watched_or_checked",
        "C4",
        "verify",
        at_result(
            "nats *= 0.98 if not self.config.scores_file and self.config.spot_checks < 0.5 else 1"
        ),
    ),
    Violation(
        "result_line_lowered",
        "C4",
        "verify",
        replaced(RESULT_LINE, "{score", "{0.98 * score"),
    ),
    Violation(
        "bytes_of_the_untrimmed_text",
        "bytes",
        "both",
        (
            (
                TRIMMED,
                f"{TRIMMED}; rest = tokens[len(scored) - 1 :]; "
                "globals().update(REST=int(token_bytes.count(rest[:-1], rest[1:]).sum()))",
            ),
            *at_result("num_bytes += REST"),
        ),
    ),
    Violation(
        "rate_halved_where_validation_rises",
        "training",
        "verify",
        (
            (
                LINE_OF_LOG,
                "        if score.val_loss > self.__dict__.get('best', 99):\n"
                "            for group in self.adamw.param_groups:\n"
                "                group['base_lr'] *= 0.5\n"
                f"        self.best = score.val_loss\n{LINE_OF_LOG}",
            ),
        ),
    ),
]

VIOLATIONS = [*ACCOUNTING, *DISTRIBUTION, *LOOKING_AHEAD, *LEARNING_FIRST, *TRAINING, *SUBTLE]
