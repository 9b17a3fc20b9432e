"""The exercises: their numbers, the functions they are about, tasks, hints and planted bugs.

tests/exercises.py works on them, tests/test_exercises.py checks them. The solution of an exercise
is the code itself, so nothing here repeats it; a bug is an edit of a few lines of one function.
Shares and losses in symptoms are those of assets/lal.pt on 45 test clips, seed 0.
"""
from dataclasses import dataclass


@dataclass(frozen=True)
class Exercise:
    number: int
    file: str
    function: str      # its name, with the class before it: KVCache.fork
    title: str
    minutes: int
    level: int         # 1 to 3
    text: str          # of a fill-in the task, of a bug hunt the symptom
    hints: tuple       # the first is shown with every red check
    needs: tuple = ()  # numbers of exercises that have to be green before
    then: str = ""     # what to try when it is green
    old: str = ""      # of a bug hunt: lines of the function,
    new: str = ""      # and what a planted bug makes of them

    @property
    def is_hunt(self):
        return bool(self.old)


FILL_INS = (
    Exercise(
        1, "encoders.py", "mel_filters", "mel filters", 35, 2,
        "Compute the triangles that sum a spectrum's bins into mel bands. Bin k of `bins`\n"
        "stands for k * rate / (2 (bins - 1)) Hz. The mels + 2 corners are evenly spaced in\n"
        "mel from `low` to `high`. HTK's and Kaldi's mel is log(1 + f / 700), times any\n"
        "constant. Slaney's is 3 f / 200 below 1000 Hz and 15 + 27 log(f / 1000) / log(6.4)\n"
        "above. Triangle m is 0 at corners m and m + 2, 1 at corner m + 1 and straight\n"
        "between, in Hz, or for scale kaldi in mel. For slaney multiply it by 2 / (corner m +\n"
        "2 - corner m), in Hz.",
        ("Get the corners in Hz first: np.linspace in mel, then the inverse of the formula.",
         "A triangle is max(0, min(rise, fall)): two straight lines, one up and one down.",
         "For scale kaldi only, bins and corners both stay in mel: log(1 + hz / 700)."),
        then="python -m pytest tests/test_encoders.py -k front_end"),
    Exercise(
        2, "encoders.py", "Whisper.spectrogram", "log-mel spectrogram", 25, 2,
        "Make Whisper's spectrogram (B, M, F) of waves (B, samples), float32. Pad with zeros,\n"
        "or cut, to self.frames * 160 samples. power_spectrum(wave, self.window, 160) is (B,\n"
        "F + 1, 201); its last frame is left out. Times self.filters (201, M) it is the mel\n"
        "power p. x = log10(max(p, 1e-10)); then nothing may be more than 8 below the largest\n"
        "x of its own clip; the result is (x + 4) / 4, with the bands before the frames.",
        ("F.pad with a negative number cuts. Frames come last: transpose(1, 2).",
         "'Of its own clip': amax over both axes but the first, with keepdim=True.",
         "Order: pad, power, drop the last frame, filters, clamp, log10, floor, scale, transpose."),
        (1,), "python -m pytest tests/test_encoders.py -k whisper_front_end"),
    Exercise(
        3, "model.py", "rotary", "rotary positions", 30, 2,
        "Compute cos and sin of positions (1 or B, T), each (1 or B, T, 1, d), the 1 for the\n"
        "heads of what `rotate` turns, of the angles position * theta^(-2i/d)\n"
        "for i = 0 .. d/2 - 1; d is config.head_dim, theta config.rope_theta. The d/2 values\n"
        "stand there twice, one after another; the first copy of sin is negative. Compute in\n"
        "float64 if `dtype` is float64, else in float32, and return `dtype`. With\n"
        "config.rope_scaling, a dict with the keys in LLAMA3_ROPE, let w = theta^(-2i/d), turns =\n"
        "original_max_position_embeddings * w / (2 pi) and s = (turns - low_freq_factor) /\n"
        "(high_freq_factor - low_freq_factor), kept within 0 and 1; w becomes w * (s + (1 -\n"
        "s) / factor).",
        ("positions[..., None] * frequency is (1 or B, T, d/2); the axis of heads is missing yet.",
         "cos: torch.cat([cos, cos], -1). sin: torch.cat([-sin, sin], -1), as `rotate` adds them.",
         "turns - low may be negative: clamp(0, 1) before it is used."),
        then="python -m pytest tests/test_model.py -k 'straight_line or distance'"),
    Exercise(
        4, "model.py", "position_mask", "the position mask", 10, 1,
        "The one rule of what sees what: 0 where the key's position is not after the query's,\n"
        "else minus infinity. queries (1 or B, T), keys (1 or B, S) -> (1 or B, 1, T, S), of\n"
        "`dtype`.",
        ("Compare keys[:, None, None, :] with queries[:, None, :, None].",
         "A query sees the key at its own position: hidden is what is greater, not equal.",
         "torch.zeros_like(hidden, dtype=dtype).masked_fill(...)"),
        then="python -m lib.plots masks out/masks.png"),
    Exercise(
        5, "model.py", "KVCache.fork", "the fork of a cache: hear once, ask many", 35, 3,
        "Return a new KVCache(layers, capacity) whose row i goes on from row clip_index[i] of\n"
        "this one; this one stays as it is. Keys and values of a layer that holds S tokens\n"
        "become tensors (rows, S + capacity, K, d), whose first S slots are the selected\n"
        "rows; a layer that holds nothing keeps None. Positions, next_position, in_order\n"
        "and each tensor of extra go along. What has one row stands for all rows: positions\n"
        "(1, S) stay (1, S), keys (1, S, K, d) are copied to each row. next_position may be\n"
        "an int.",
        ("Write a helper that selects rows, and leaves ints and tensors of one row alone.",
         "new_empty(rows, S + capacity, ...), then [:, :S] = the selected rows: one is broadcast.",
         "Of keys only the first S slots count: S is positions.shape[1]; others are spare."),
        then="python -m pytest tests/test_model.py -k 'fork or leaves_the_cache'"),
    Exercise(
        6, "integrate.py", "hear", "LAL's write of keys and values", 40, 2,
        "The heart of the paper. Without a cache make KVCache(number of layers). route plits:\n"
        "llm.model(audio, positions, cache) writes the cache; AssertionError if `layers` is\n"
        "not None. Any other route but lal is an AssertionError. route lal: for each layer i\n"
        "of `layers` (None: all), of block = llm.model.layers[i] and block.self_attn,\n"
        "    n = audio / sqrt(mean(audio^2) + eps) * gain      block.input_layernorm\n"
        "    k = rotate(W_K n + b_K),  v = W_V n + b_V         k_proj, v_proj; then split_heads\n"
        "Call k_proj and v_proj, unless they are model.py's Linear: they may be LoRA's.\n"
        "First positions = cache.extend(audio, positions, layers), last cache.append(i, k,\n"
        "v). rotate(k, rotary(positions, llm.config, audio.dtype)) turns the keys; with\n"
        "rotate_keys=False as if all stood at position 0. Audio asks nothing: no queries, no\n"
        "MLP.",
        ("Every layer gets the same audio: no result of one layer goes into the next.",
         "block.input_layernorm(audio) is the norm; attention.split_heads(attention.k_proj(n)).",
         "extend is called once for all layers, append once for each. Values are not rotated."),
        (3,), "python -m pytest tests/test_integrate.py -k 'one_layer or keys_and_values'"),
    Exercise(
        7, "integrate.py", "prefill", "PLITS over a cache: run or write, group by group", 45, 3,
        "Go through the segments in order; leave out those without tokens; neighbours of one\n"
        "route and one `layers` are one group. tokens: those of a group, joined by\n"
        "cat_broadcast along dimension 1. positions: padded_positions(group,\n"
        "cache.next_position), before the group goes in. A plits group is one call\n"
        "llm.model(tokens, positions, cache), which returns hidden states; its tokens are\n"
        "expanded to the largest batch so far. Any\n"
        "other group goes to write(llm, tokens, route, cache, layers, positions) and\n"
        "returns nothing. Return the hidden states of the last group, None if it was written\n"
        "or there is none.",
        ("itertools.groupby with key=lambda s: (s.route, s.layers) makes the groups.",
         "functools.reduce(cat_broadcast, [...]) joins; a batch of one is expanded by it.",
         "A group that is written sets hidden to None; largest batch: max over groups so far."),
        then="python -m pytest tests/test_integrate.py"),
    Exercise(
        8, "integrate.py", "pal", "PAL's order of segments", 20, 2,
        "Lay out the segments: `before` (embedded ids, route plits), prefix (plits), side\n"
        "(lal, with `layers`), the embedded ids of the text (plits); what is None is left out.\n"
        "prefill them. Return llm.head of the text's hidden states alone.",
        ("Segment(route, tokens); llm.embed(ids) is (B, T, D).",
         "With plits everything is one group: hidden has more than the text, the text is its end.",
         "hidden[:, -ids.shape[1]:]"),
        (3, 4, 6, 7), "python -m pytest tests/test_integrate.py -k 'agree or other_mode'"),
    Exercise(
        9, "integrate.py", "pool", "pooling of encoder tokens", 10, 1,
        "Average groups of `size` tokens of (n, De), one after another; a last group may be\n"
        "smaller and is the average of what it has. The result is (ceil(n / size), De), in the\n"
        "dtype of tokens.",
        ("The last group divides by its own number of tokens, not by size.",
         "tokens.split(size) gives the groups; or F.avg_pool1d with ceil_mode=True.",
         "In bfloat16 sum in float32: tokens.float(), and back at the end."),
        then="python -m pytest tests/test_integrate.py -k pooling"),
    Exercise(
        10, "integrate.py", "make_mlp", "the MLP connector", 10, 1,
        "Return an nn.Sequential that maps (..., width) to (..., out): W_2 gelu(W_1 x + b_1)\n"
        "+ b_2, gelu exact, not the tanh approximation. `hidden` values stand between; None:\n"
        "as many as `out`. The layers' names in a checkpoint are 0, 1 and 2, so nothing else\n"
        "stands in it.",
        ("Three modules: nn.Linear, nn.GELU, nn.Linear.",
         "hidden = hidden or out",),
        then="python -m pytest tests/test_integrate.py -k 'mode_is_nothing'"),
    Exercise(
        11, "model.py", "LLM.loss", "the answers-only weighted loss", 20, 2,
        "Sum over t of weights[t] * -log p(ids[t] | what comes before t). hidden (B, T - 1,\n"
        "D): the state at t predicts token t + 1. ids, weights (B, T). Weights of 0 belong to\n"
        "prompts and padding; compute logits, self.head, for the other tokens alone.",
        ("The first token is predicted by nothing: targets are ids[:, 1:], and so are weights.",
         "hidden[weights[:, 1:] > 0] is (n, D), the states that are used.",
         "F.cross_entropy(..., reduction='none'), times the weights, summed: it is no mean."),
        then="python -m pytest tests/test_train.py -k loss_is_that"),
    Exercise(
        12, "model.py", "sample_token", "nucleus sampling", 20, 2,
        "The next token (B,) of logits (B, V). temperature 0: the likeliest. Else p =\n"
        "softmax(logits / temperature); keep the fewest likeliest tokens that together have\n"
        "probability top_p or more, always one at least; draw among them in proportion to p,\n"
        "with torch.multinomial and the generator rng.",
        ("Sort p in descending order, keep the order: at the end it gives the token's id.",
         "A token is kept if the sum of those before it, cumsum - p, is below top_p.",
         "torch.multinomial takes weights that do not sum to one; then order.gather(1, ...)."),
        then="python -m pytest tests/test_model.py -k sampling"),
    Exercise(
        13, "lib/tokenizers.py", "BPETokenizer.merge", "byte-pair merging", 25, 2,
        "The ids (a list) of a piece of text: begin with its characters, those that\n"
        "self.vocab has; while any neighbouring pair is in self.ranks {(a, b): rank}, join\n"
        "the pair of the lowest rank everywhere it stands, from left to right; then\n"
        "self.vocab gives the ids. If self.ignore_merges is set and the whole piece is in\n"
        "self.vocab, it is that one id.",
        ("One round: the pair of the lowest rank, and all its places, from left to right.",
         "'aaa' with the pair (a, a) is 'aa', 'a': a part that was used is not used again.",
         "min(zip(parts, parts[1:]), key=...) with a rank beyond all others for unknown pairs."),
        then="python -m pytest tests/test_tokenizers.py -k package"),
    Exercise(
        14, "bench.py", "layer_flops", "forward FLOPs of a layer", 20, 1,
        "FLOPs of one layer and one row of a batch, as a dict of four parts. (m, k) times (k,\n"
        "n) is 2 m k n. D, Hd, Kd = widths(c): of the residual stream, of all queries, of all\n"
        "keys. 'q, o': W_Q (D to Hd) and W_O (Hd to D) of the `run` tokens. 'k, v': W_K, W_V\n"
        "(D to Kd) of the run and the written ones. 'attention': q k^T and softmax(...) v,\n"
        "for `pairs` pairs of a query and a key, in all heads together Hd wide. 'feed-\n"
        "forward': gate, up and down, between D and c.intermediate_size, of the run tokens.",
        ("W_Q x of n tokens is 2 * n * D * Hd.",
         "A pair costs 2 Hd in q k^T, and 2 Hd more where its weight multiplies v.",
         "A token that is only written costs k and v, and nothing else: that is LAL."),
        then="python bench.py --measure nothing"),
    Exercise(
        15, "lib/scores.py", "edit_distance", "word error rate", 20, 1,
        "The fewest insertions, deletions and substitutions that turn one list of words into\n"
        "the other. d(i, j), of the first i words of one and j of the other, is the least of\n"
        "d(i - 1, j) + 1, d(i, j - 1) + 1 and d(i - 1, j - 1) + (0 if words i and j are\n"
        "equal, else 1); d(i, 0) = i, d(0, j) = j. Time len(answer) * len(reference): no\n"
        "recursion.",
        ("A table of (len(answer) + 1) x (len(reference) + 1) numbers, row by row.",
         "The first row and the first column are 0, 1, 2, ...: nothing against i words.",),
        then="python -m pytest tests/test_scores.py"),
    Exercise(
        16, "lib/attention.py", "attention_weights", "attention of an answer's words", 45, 3,
        "Call read(), and find out how each layer's attention looked at the keys while it\n"
        "ran. A forward hook on block.self_attn of each block of llm.model.layers gets\n"
        "(module, inputs, output), inputs being x (B, T, D), angles, mask, cache and the\n"
        "layer's number. Of each call append (weights (B, H, T, S), positions of the keys) to\n"
        "a list, which is returned. weights = softmax(q k^T / sqrt(d) + mask): q is\n"
        "rotate(split_heads(q_proj(x)), angles); k is cache.keys[layer], of which the first S\n"
        "slots hold the S positions in cache.positions[layer]. H heads share K keys, H / K\n"
        "neighbours one. The T queries are the last of the S tokens; position_mask(queries,\n"
        "keys, dtype) gives the mask. Remove the hooks even if read() fails.",
        ("k.repeat_interleave(H // K, dim=2): heads 0, 1 share key 0, heads 2, 3 key 1.",
         "torch.einsum('bthd,bshd->bhts', q, k) / head_dim ** 0.5, plus the mask, then softmax.",
         "positions[:, S - T:] are the queries' positions. try: read() finally: hook.remove()."),
        (3, 4), "python sample.py --audio assets/demo.wav --prompt 'Describe the audio.' "
                "--listen out/listen.png"))

HUNTS = (
    Exercise(
        21, "model.py", "attention_mask", "the deaf first word", 25, 2,
        "Scored on a list, assets/lal.pt answers 93.6% of 362 questions rightly, as it always\n"
        "did. Asked the first 150 of them one at a time, it answers 10.7% rightly; before the\n"
        "bug it was 93.3%.",
        ("Text alone is right, text over a cache is not. What differs between the two?",
         "With T queries and S > T keys, which keys does query 0 see? Draw the mask.",
         "A triangle of T x S has two places where its diagonal may begin; is_causal has one."),
        old="if in_order and T == S:", new="if in_order:"),
    Exercise(
        22, "integrate.py", "hear", "louder is different", 20, 2,
        "assets/lal.pt, which answered 93.6% of its questions rightly, answers none of them.\n"
        "With one layer LAL must equal PLITS to the last digit, and it does not. Audio tokens\n"
        "that are twice as large change LAL's answers.",
        ("What in a decoder layer makes it blind to the size of its input?",
         "PLITS and LAL share the same weights up to the keys and values. Compare step by step.",
         "k = W_K norm(a)"),
        old="normalized = F.rms_norm(audio, audio.shape[-1:], eps=llm.config.rms_norm_eps)",
        new="normalized = audio"),
    Exercise(
        23, "integrate.py", "hear", "before or after?", 20, 2,
        "assets/lal.pt answers 89.0% of its questions instead of 93.6%; captions suffer most\n"
        "(71% instead of 84%). A clip whose audio tokens are given in reverse order gives\n"
        "exactly the same logits.",
        ("Which part of attention knows about order?",
         "Look at where each key of the audio believes that it stands.",),
        old="rotary(positions if rotate_keys else 0 * positions,",
        new="rotary(0 * positions,"),
    Exercise(
        24, "data/lists.py", "tokenize_conversation", "it learns to ask", 15, 1,
        "On questions that assets/lal.pt has learnt well its training loss is 42.8; it was\n"
        "0.07. A model trained like this would learn to go on with a question of its own.",
        ("Which tokens does the loss count? There is one weight for each.",
         "A user's words are not for the model to say.",),
        old="weights += [0.0] * len(prompt) + [len(answer) ** -0.5] * len(answer)",
        new="weights += [len(answer) ** -0.5] * (len(prompt) + len(answer))"),
    Exercise(
        25, "integrate.py", "AudioLLM.train", "the frozen encoder that moves", 25, 2,
        "All encoders are frozen and their parameters stay the same to the bit; still, CLAP's\n"
        "features of a clip are not those of yesterday, and depend on which other clips are\n"
        "in the batch.",
        ("Not every number of a module is a parameter: look at its buffers.",
         "Batch normalisation uses the batch in one mode, and what it has learnt in the other.",
         "Who calls train() on what?"),
        old="encoder.train(mode and not encoder.frozen)", new="encoder.train(mode)"),
    Exercise(
        26, "model.py", "make_positions", "the neighbour in the batch", 25, 2,
        "A clip or a question that is shorter than its neighbours in the batch is answered\n"
        "from other hidden states than alone. Where all have the same length nothing is\n"
        "wrong, and the score of a list falls by a point or two only.",
        ("What does a short row have in a batch that it does not have alone?",
         "Padding stands where no query reaches. Does all of it?",
         "Count: how many tokens of a row of length n get a position?"),
        old="steps >= lengths", new="steps > lengths"),
    Exercise(
        27, "model.py", "KVCache.extend", "all at the same time", 25, 2,
        "assets/lal.pt answers 14.9% of its questions rightly, where it was 93.6%; on silence\n"
        "it is 12.2%. A question that is read after the audio in one pass gets other logits\n"
        "than the same question read over the cache that holds the audio.",
        ("The keys in the cache are right. What about those that come after?",
         "Print the positions of audio and question in both cases.",
         "After each group of tokens the next position has to be moved on."),
        old="positions, self.next_position = make_positions",
        new="positions, _ = make_positions"),
    Exercise(
        28, "encoders.py", "SSLAM.spectrogram", "the sound of nothing", 20, 2,
        "A clip of 10.24 s fills SSLAM's window, and its spectrogram equals that of the code\n"
        "with which SSLAM was trained. Of a shorter clip it does not: what stands there after\n"
        "the clip's end is another number.",
        ("What is the value of the spectrogram where a short clip has ended?",
         "Two operations do not commute here.",
         "Is a zero that is padded also normalised?"),
        old="        # Zeros first, normalisation after: to the model padding is 0.467, not 0 and "
            "not silence.\n"
            "        x = F.pad(x, (0, 0, 0, self.frames - x.shape[1]))\n"
            "        return ((x + 4.268) / (2 * 4.569))[:, None]",
        new="        # Every clip fills the whole window.\n"
            "        x = (x + 4.268) / (2 * 4.569)\n"
            "        return F.pad(x, (0, 0, 0, self.frames - x.shape[1]))[:, None]"),
    Exercise(
        29, "sample.py", "answer_all", "good answers, bad score", 20, 1,
        "Asked one by one at the terminal, the model answers nearly all questions rightly. On\n"
        "a list in which questions about several clips are mixed most answers are wrong,\n"
        "though each of them would be right somewhere. On a list sorted by clip the score is\n"
        "fine.",
        ("Read some answers beside their questions.",
         "In which order are the questions asked, and in which do the answers come back?",),
        old="return [answers[i] for i in range(len(questions))]",
        new="return list(answers.values())"),
    Exercise(
        30, "lib/profiling.py", "time_in_turns", "the slow first one", 15, 1,
        "The fewer rounds bench.py measures (--rounds), the slower everything seems to be, by\n"
        "far more than chance.",
        ("What does a function do the first time that it never does again?",
         "How many rounds are run, and which of them are returned?",),
        old="seconds[1:] for name", new="seconds[:rounds] for name"),
    Exercise(
        31, "lib/attention.py", "attention_weights", "the wrong heads", 25, 3,
        "The picture of where an answer listened (--listen) has changed, though the answers\n"
        "have not: of the attention that the word 'siren' gives to SSLAM in assets/demo.wav\n"
        "52% falls on the siren, where it was 70%. Rows sum to one; and with as many key-\n"
        "value heads as query heads the picture is right.",
        ("Query heads share key-value heads. Which ones share?",
         "Compare how the model's own attention spreads K heads over H.",
         "[k0, k0, k1, k1] or [k0, k1, k0, k1]?"),
        old="k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)",
        new="k = k.repeat(1, 1, q.shape[2] // k.shape[2], 1)"))

EXERCISES = {exercise.number: exercise for exercise in FILL_INS + HUNTS}
