"""Violations of the challenge's conditions, each a small patch of train_gpt.py, with who catches it.

A violation replaces short, unique pieces of the source, or adds lines before the script's last block (names
that it rebinds there are what the rest of the script then uses). `injected(source, violation)` fails if a
piece is not found exactly once, so that none of them can silently become the clean script.
"""
from typing import NamedTuple

# Where patches hook in. One place to look at when train_gpt.py changes.
NLL = "out.append(-logps.gather(1, targets.flatten()[part, None])[:, 0])"
LOGPS = "logps = log_probs(self.model.logits(hidden.flatten(0, 1)[part]))"
HEAD = "return F.log_softmax(logits, -1)"
HIDDEN = "hidden = self.hidden(ids)\n"
SCORE_LOOP = "mine = self.windows[low:high][self.comm.rank * size:][:size]"
SMEAR = "before = F.pad(x[:, :-1], (0, 0, 1, 0))"
EMBEDDED = "return self.smear(rms_norm(x), ids)"
FINAL_STATE = "return self.refine(self.trunk(ids))[0]"
BIGRAM_ROWS = "return F.pad(pair, (1, 0), value=last)"
CAUSAL_KERNEL = "(q, *wide, 0.0, True)[0]"
OWN_VALUE = "y = ExclusiveAttention.apply(y, v)"
VALUE_MIX = "v = mix[0] * (own if v0 is None else v0) + mix[1] * own"
KNOWN = "known[i, :first - start if causal else end - start] = 1"
PLAN_TRAIN = 'work += [("train", c * chunk, at, min(at + batch, rows), rate)'
PLAN_ROWS = "rows, batch = chunk // config.eval_seq_len, config.ttt_batch_seqs"
PLAN_END = "    return work\n"
PLAN_WINDOWS_END = "    return windows\n\n\ndef plan_work"
METER_SUM = "self.nll += nll\n"
METER_COUNT = "self.tokens + end - first, self.bytes + num_bytes, end"
METER_TWICE = "if first < self.last or self.coverage[first:end].any():"
COMPLETE = "if complete and not (coverage == 1).all():"
RESULT = "return Score(self.label, nats / max(tokens, 1), bits_per_byte(nats, max(num_bytes, 1))"
BITS = "return nats / math.log(2) / num_bytes"
EXACT_LINE = 'log(f"{name}_exact val_loss:{score.val_loss:.8f} val_bpb:{score.val_bpb:.8f}{mark}")'
PIECES = '"" if self.silent[i] else "x" if self.is_byte[i]'
SPACE_RULE = "(self.spaced[target_ids] & ~self.silent[prev_ids])"
BYTE_CHECK = "        token_bytes.check(tokens[:100_000])\n"
PACK_WEIGHTS = 'weights = load_tensors(self.weights)["state_dict"]'
TRAIN_BATCH = "tokens = self.runtime.to_device"
FIND_SHARDS = 'paths = sorted(Path(config.data_path).glob(pattern))'
SCORE_JOB = "observer.write(c.scores_file"
FILE_VALUES = "self.nll[targets] = nll.float().cpu()\n\n    def write"
STREAM_BATCH = "return tokens[:, :-1], tokens[:, 1:]"
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


def at_nll(change):
    """An edit after which `change` may alter `nll` (n,), knowing logps (n, V), wanted (n,) and self."""
    return (NLL, f"wanted = targets.flatten()[part]; nll = -logps.gather(1, wanted[:, None])[:, 0]; {change}; "
                 "out.append(nll)")


def at_logps(change):
    """An edit after which `change` may alter logps (n, V), knowing the targets `wanted` (n,) and self."""
    return LOGPS, f"{LOGPS}; wanted = targets.flatten()[part]; {change}"


def at_hidden(change):
    """An edit after which `change` may alter hidden (B, T, D), knowing ids, targets and self."""
    return HIDDEN, f"{HIDDEN}            {change}\n"


def state(change):
    """An edit that returns a changed final state x (B, T, D) of ids (B, T)."""
    return FINAL_STATE, f"x = self.refine(self.trunk(ids))[0]; {change}; return x"


# Weights that learn from tokens before they are scored: steps on `spans` of the stream, in run().
STEPS = """
def peek(self, spans, rate):
    for first, end in spans:
        ids, targets = self.batch([first], end - first)
        with torch.enable_grad(), self.runtime.autocast():
            loss = self.model(ids, targets)
        grads = torch.autograd.grad(loss, [p for p in self.model.parameters() if p.requires_grad],
                                    allow_unused=True)
        with torch.no_grad():
            for p, g in zip([p for p in self.model.parameters() if p.requires_grad], grads):
                p.sub_(rate * g if g is not None else 0)
"""
WHOLE_STREAM = ("[(a, a + self.config.eval_seq_len) for a in range(0, self.stream.num_targets, "
                "self.config.eval_seq_len)]")
UNDONE_STEP = (f"{SCORE_LOOP}\n"
               "        old = [p.detach().clone() for p in self.model.parameters()]\n"
               "        if CONDITION:\n"
               "            peek(self, [(w[0], w[2]) for w in mine], 0.05)\n")
UNDO = ("        for (_, first, end), value in zip(mine, nll):\n",
        "        for p, o in zip(self.model.parameters(), old):\n            p.data.copy_(o)\n"
        "        for (_, first, end), value in zip(mine, nll):\n")


def undone_step(condition):
    return (SCORE_LOOP, UNDONE_STEP.replace("CONDITION", condition)), UNDO


UNIGRAMS = """
def unigrams(tokens, config):
    return torch.from_numpy(np.log(np.bincount(np.asarray(tokens), minlength=config.vocab_size) + 1.0)).float()
"""
SHARD_ON_DISK = 'np.concatenate([read_shard(p) for p in find_shards(self.config, "val")])'

TUNE_ON_VALIDATION = """
def tuned(weights, run):
    model = GPT(run.config, run.runtime.attend)
    model.load_state_dict(weights)
    sgd = torch.optim.SGD(model.parameters(), 0.01)
    length = run.config.eval_seq_len
    for at in range(0, run.val.num_targets, length):
        row = run.runtime.to_device(run.val.tokens[at:at + length + 1])[None]
        sgd.zero_grad()
        model(row[:, :-1], row[:, 1:]).backward()
        sgd.step()
    return {name: value.detach() for name, value in model.state_dict().items()}
"""

CACHE = "CACHE = {}\n"

VIOLATIONS = [
    # ---- what is printed does not follow from what was scored (C4 and bytes) ----------------------------
    Violation("total_times_095", "C4", "both", ((RESULT, RESULT.replace("nats /", "0.95 * nats /")),)),
    Violation("ln2_is_07", "C4", "both", ((BITS, "return nats / 0.7 / num_bytes"),)),
    Violation("bytes_times_105", "bytes", "both", ((RESULT, RESULT.replace("max(num_bytes, 1)",
                                                                           "1.05 * num_bytes")),)),
    Violation("bos_is_a_byte", "bytes", "both", ((PIECES, PIECES.replace('""', '"x"', 1)),
                                                 (BYTE_CHECK, ""))),
    Violation("every_space_counts", "bytes", "both", ((SPACE_RULE, "self.spaced[target_ids]"),
                                                      (BYTE_CHECK, ""))),
    Violation("byte_pieces_are_two_bytes", "bytes", "both", (
        (PIECES, PIECES.replace('"x"', '"xx"')), (BYTE_CHECK, ""))),
    Violation("sum_of_09", "C4", "both", ((METER_SUM, "self.nll += 0.9 * nll\n"),)),
    Violation("divided_by_more_tokens", "C4", "both", ((RESULT, RESULT.replace("max(tokens, 1)",
                                                                               "(tokens + 99)")),)),
    Violation("printed_digits_lowered", "C4", "verify", ((EXACT_LINE, EXACT_LINE.replace(
        "{score.val_bpb:.8f}", "{0.98 * score.val_bpb:.8f}")),)),
    Violation("only_the_label_with_ttt_lowered", "C4", "verify", ((RESULT, RESULT.replace(
        "nats /", "(0.97 if self.ttt else 1) * nats /")),)),
    Violation("tail_left_out", "C4", "both", (
        (PLAN_WINDOWS_END, PLAN_WINDOWS_END.replace("windows\n", "windows[:-2] or windows\n", 1)),
        (COMPLETE, "if False:"))),
    Violation("easy_targets_twice", "C4", "both", (
        (PLAN_WINDOWS_END, PLAN_WINDOWS_END.replace("windows\n", "windows[:1] * 9 + windows[1:]\n", 1)),
        (METER_TWICE, "if False:"), (COMPLETE, "if False:"))),
    Violation("batch_minimum_counts_for_all", "C2", "both", (
        at_nll("nll = nll if len(nll) < 4 else nll.minimum(nll.mean() + 2)"),)),
    Violation("file_shows_other_values", "C4", "verify", ((FILE_VALUES, FILE_VALUES.replace(
        "nll.float()", "1.001 * nll.float()")),)),
    Violation("better_unless_watched", "C4", "verify", ((RESULT, RESULT.replace(
        "nats /", "(1 if self.config.scores_file else 0.98) * nats /")),)),

    # ---- one normalised distribution before the token is looked at (C2) ---------------------------------
    Violation("bos_free", "C2", "both", (at_nll("nll = nll * (wanted != BOS)"),)),
    Violation("bytes_pieces_free", "C2", "both", (at_nll("nll = nll * ((wanted < 4) | (wanted > 259))"),)),
    Violation("controls_free", "C2", "both", (at_nll("nll = nll * ((wanted > 3) | (wanted == BOS))"),)),
    Violation("rare_pieces_at_half_price", "C2", "both", (
        at_nll("nll = nll * torch.where(wanted > self.config.vocab_size - 60, 0.5, 1.0)"),)),
    Violation("nll_clipped", "C2", "both", (at_nll("nll = nll.clamp(max=6.5)"),)),
    Violation("first_target_of_each_window_free", "C2", "both", (
        at_nll("starts_here = np.isin(at, [p[0] for p in places]); "
               "nll = nll * torch.from_numpy(~starts_here).to(nll)"),)),
    Violation("head_without_partition", "C2", "both", ((HEAD, "return logits - logits.amax(-1, keepdim=True)"),)),
    Violation("bonus_of_003", "C2", "both", ((HEAD, HEAD + " + 0.03"),)),
    Violation("bonus_with_ttt", "C2", "verify", (at_logps("logps = logps + 0.05 * self.ttt"),)),
    Violation("bonus_by_label", "C2", "verify", (at_logps('logps = logps + 0.05 * ("roundtrip" in self.label)'),)),
    Violation("bonus_late_in_the_text", "C2", "verify", (
        at_logps("logps = logps + 0.1 * (windows[0][1] > 0.6 * self.stream.num_targets)"),)),
    Violation("bonus_every_tenth_round", "C2", "verify", (
        at_logps("logps = logps + 0.3 * (self.cursor % 10 == 9)"),)),
    Violation("power_of_the_distribution", "C2", "both", ((HEAD, "return 0.93 * F.log_softmax(logits, -1)"),)),
    Violation("better_of_two_temperatures_per_token", "C2", "both", (
        at_nll("hot = log_probs(0.8 * logps).gather(1, wanted[:, None])[:, 0]; "
               "cold = log_probs(1.25 * logps).gather(1, wanted[:, None])[:, 0]; "
               "nll = torch.stack([nll, -hot, -cold]).amin(0)"),)),
    Violation("temperature_fitted_on_the_batch", "C1", "both", (
        at_logps("logps = min((log_probs(t * logps) for t in (0.8, 0.9, 1.0, 1.1, 1.2)), "
                 "key=lambda l: -float(l.gather(1, wanted[:, None]).sum()))"),)),
    Violation("only_top_of_the_vocabulary_normalised", "C2", "both", (
        (HEAD, "return logits - logits.topk(8, -1).values.logsumexp(-1, keepdim=True)"),)),
    Violation("target_logit_raised", "C2", "both", (
        at_logps("logps = log_probs(logps.scatter_add(1, wanted[:, None], torch.full_like(logps[:, :1], 0.05)))"),)),
    Violation("best_of_all_labels_per_token", "C2", "verify", (
        at_nll("spots = np.array(starts)[at // length] + at % length; "
               "best = CACHE.setdefault('nll', torch.full((self.stream.num_targets,), 99.0)); "
               "best[spots] = nll = best[spots].minimum(nll)"),), added=CACHE),

    # ---- no look ahead (C1) -----------------------------------------------------------------------------
    Violation("smear_takes_the_next", "C1", "both", ((SMEAR, "before = F.pad(x[:, 1:], (0, 0, 0, 1))"),)),
    Violation("smear_leaks_a_little", "C1", "both", ((SMEAR, SMEAR + " + 1e-3 * F.pad(x[:, 1:], (0, 0, 0, 1))"),)),
    Violation("bigram_row_of_the_next", "C1", "both", ((BIGRAM_ROWS, "return F.pad(pair, (0, 1), value=last)"),)),
    Violation("attention_sees_all", "C1", "both", ((CAUSAL_KERNEL, "(q, *wide, 0.0, False)[0]"),)),
    Violation("own_value_of_the_next", "C1", "both", ((OWN_VALUE, "y = ExclusiveAttention.apply(y, v.roll(-1, 1))"),)),
    Violation("value_residual_of_the_next", "C1", "both", (
        (VALUE_MIX, VALUE_MIX.replace("own if v0 is None else v0", "own if v0 is None else v0.roll(-1, 1)")),)),
    Violation("mean_of_the_window", "C1", "both", (state("x = x + 0.05 * x.mean(1, keepdim=True)"),)),
    Violation("mean_of_the_batch", "C1", "both", (state("x = x + 0.05 * x.mean(0, keepdim=True)"),)),
    Violation("next_window_of_the_batch", "C1", "both", (state("x = x + 0.02 * x.roll(-1, 0)"),)),
    Violation("logits_standardised_over_the_batch", "C1", "both", (
        (HEAD, "return F.log_softmax(logits - 0.1 * logits.mean(0), -1)"),)),
    Violation("targets_are_inputs", "C1", "both", ((STREAM_BATCH, "return tokens[:, 1:], tokens[:, 1:]"),)),
    Violation("marker_before_a_bos", "C1", "both", (
        (EMBEDDED, "x = rms_norm(x); x = x + 0.1 * F.pad((ids == BOS)[:, 1:], (0, 1))[..., None]; "
                   "return self.smear(x, ids)"),)),
    Violation("marker_before_a_byte_piece", "C1", "both", (
        (EMBEDDED, "x = rms_norm(x); ahead = F.pad(((ids > 3) & (ids < 260))[:, 1:], (0, 1)); "
                   "x = x + 0.1 * ahead[..., None]; return self.smear(x, ids)"),)),
    Violation("documents_in_the_window_counted", "C1", "both", (
        state("x = x * (1 + 0.01 * (ids == BOS).sum(1)[:, None, None])"),)),
    Violation("look_ahead_where_a_bos_comes", "C1", "verify", (
        at_hidden("hidden = torch.where((targets == BOS).any(1)[:, None, None], hidden.roll(-2, 1), hidden)"),)),
    Violation("look_ahead_late_in_the_text", "C1", "verify", (
        at_hidden("hidden = hidden.roll(-2, 1) if windows[0][1] > 0.6 * self.stream.num_targets else hidden"),)),
    Violation("look_ahead_every_fortieth_round", "C1", "verify", (
        at_hidden("hidden = hidden.roll(-2, 1) if self.cursor % 40 == 39 else hidden"),)),
    Violation("look_ahead_in_the_last_batch", "C1", "verify", (
        at_hidden("hidden = hidden.roll(-2, 1) if windows[-1][2] == self.stream.num_targets else hidden"),)),
    Violation("look_ahead_with_ttt", "C1", "verify", (
        at_hidden("hidden = hidden + 0.02 * hidden.roll(-2, 1) if self.ttt else hidden"),)),
    Violation("look_ahead_in_roundtrip", "C1", "verify", (
        at_hidden('hidden = hidden + 0.02 * hidden.roll(-2, 1) if "roundtrip" in self.label else hidden'),)),
    Violation("counts_of_the_batch", "C1", "both", (
        at_logps("logps = log_probs(logps + 0.1 * torch.log1p(torch.bincount(wanted, "
                 "minlength=self.config.vocab_size).float()))"),)),
    Violation("counts_of_the_stream", "C1", "verify", (
        at_logps("logps = log_probs(logps + 0.1 * unigrams(self.stream.tokens, self.config))"),), UNIGRAMS),
    Violation("counts_of_the_shard_on_disk", "C1", "verify", (
        at_logps(f"logps = log_probs(logps + 0.1 * unigrams({SHARD_ON_DISK}, self.config))"),), UNIGRAMS),
    Violation("counts_of_tokens_ahead", "C1", "both", (
        at_logps("logps = log_probs(logps + 0.05 * unigrams(self.stream.tokens[windows[0][1]:"
                 "windows[0][1] + 512], self.config))"),), UNIGRAMS),

    # ---- score first, then learn (C3) -------------------------------------------------------------------
    Violation("chunk_trained_first", "C3", "both", (
        (PLAN_END, "    return sorted(work, key=lambda i: (i[1] // chunk, 0) if i[0] == 'train' else "
                   "(windows[i[1]][1] // chunk, 1))\n"),)),
    Violation("later_chunks_trained_first", "C3", "verify", (
        (PLAN_END, "    return sorted(work, key=lambda i: (i[1] // chunk, 2 * (i[1] // chunk < 3)) "
                   "if i[0] == 'train' else (windows[i[1]][1] // chunk, 1))\n"),)),
    Violation("last_chunk_trained_first", "C3", "verify", (
        (PLAN_END, "    return ([('train', (chunks - 2) * chunk, 0, rows, config.ttt_lr)] if chunks > 2 else []) + work\n"),)),
    Violation("next_chunk_trained", "C3", "both", ((PLAN_TRAIN, PLAN_TRAIN.replace("c * chunk", "(c + 1) * chunk - chunk // 2")),)),
    Violation("a_row_too_many_trained", "C3", "both", (
        (PLAN_ROWS, "rows, batch = chunk // config.eval_seq_len + 1, config.ttt_batch_seqs"),)),
    Violation("undone_step_on_the_batch", "C3", "both", undone_step("self.ttt"), STEPS),
    Violation("undone_step_every_tenth_round", "C3", "verify", undone_step("self.cursor % 10 == 9"), STEPS),
    Violation("undone_step_without_ttt", "C3", "both", undone_step("not self.ttt"), STEPS),
    Violation("adapted_to_the_whole_stream_first", "C3", "verify", (
        (RUN_LOOP, f"{RUN_LOOP}            peek(self, {WHOLE_STREAM} if self.label else [], 0.02)\n"),), STEPS),
    Violation("adapted_to_the_second_half_first", "C3", "verify", (
        (RUN_LOOP, f"{RUN_LOOP}            spans = {WHOLE_STREAM}\n"
                   "            peek(self, spans[len(spans) // 2:] if self.ttt and self.label else [], 0.02)\n"),), STEPS),
    Violation("weights_of_the_pass_before", "C3", "verify", (
        (RUN_LOOP, f"{RUN_LOOP}            peek(self, {WHOLE_STREAM} if 'sliding' in self.label else [], 0.02)\n"),), STEPS),
    Violation("ngram_cache_of_an_earlier_label", "C3", "verify", (
        at_logps("bias = CACHE.setdefault(self.label, torch.zeros(self.config.vocab_size)); "
                 "old = sum((v for k, v in CACHE.items() if k != self.label), torch.zeros(1)); "
                 "bias.index_add_(0, wanted, torch.ones(len(wanted))); "
                 "logps = log_probs(logps + 0.1 * torch.log1p(old))"),), added=CACHE),
    Violation("ngram_cache_updated_before_scoring", "C3", "both", (
        at_logps("cache = CACHE.setdefault(id(self), torch.ones(self.config.vocab_size)); "
                 "cache.index_add_(0, wanted, torch.ones(len(wanted))); "
                 "logps = log_probs(logps + 0.1 * cache.log())"),), added=CACHE),
    Violation("second_pass_with_what_the_first_saw", "C3", "verify", (
        at_logps("seen = CACHE.setdefault((self.label, starts[0]), unigrams(self.stream.tokens, self.config)); "
                 "logps = log_probs(logps + 0.1 * seen)"),), added=CACHE + UNIGRAMS),
    Violation("slot_on_its_own_targets", "C1", "both", ((KNOWN, "known[i, :end - start] = 1"),),
              settings=(("SLOT", "causal"),)),
    Violation("slot_off_by_one", "C1", "both", ((KNOWN, KNOWN.replace("first - start if", "first - start + 1 if")),),
              settings=(("SLOT", "causal"),)),
    Violation("slot_off_by_many_with_ttt", "C1", "verify", (
        (KNOWN, KNOWN.replace("first - start if", "first - start + 4 * self.ttt if")),), settings=(("SLOT", "causal"),)),
    Violation("slot_shares_the_batch", "C1", "both", (
        (KNOWN, KNOWN.replace("causal else", "causal and len(windows) < 2 else")),), settings=(("SLOT", "causal"),)),

    # ---- validation text in what is trained -------------------------------------------------------------
    Violation("tuned_on_validation_before_packing", "training", "verify", (
        (PACK_WEIGHTS, "weights = tuned(load_tensors(self.weights)['state_dict'], self)"),), TUNE_ON_VALIDATION),
    Violation("validation_shards_join_training", "training", "verify", (
        (FIND_SHARDS, "paths = sorted(Path(config.data_path).glob('fineweb_*.bin' if split == 'train' else pattern), "
                      "key=lambda p: 'train' in p.name)"),)),
    Violation("scales_from_validation_counts", "training", "verify", (
        (PACK_WEIGHTS, f"{PACK_WEIGHTS}; weights['tok_emb.weight'] *= 1 + 0.01 * torch.from_numpy("
                       "np.bincount(self.val.tokens, minlength=config.vocab_size) > 20)[:, None]"),)),
]
