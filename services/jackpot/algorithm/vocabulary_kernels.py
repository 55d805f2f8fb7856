"""The Triton programs behind :mod:`jackpot.algorithm.vocabulary_triton`: tiles of logits that stay on the chip.

The number of programs equals the number of the GPU's processors. Each computes one tile of [BLOCK_T, BLOCK_V] logits
after another from hidden states and output layer, in float32, and reduces it while the next tile's operands are being
fetched. Logits never reach memory, except as a block's gradient in the backward pass. Operands are read through tensor
descriptors, which newer GPUs implement in hardware and older ones as pointers.
"""

import triton
import triton.language as tl

# Rows of tiles that are processed together, so that concurrent programs share operands in the cache.
_ROWS_TOGETHER = tl.constexpr(8)
# A logit beyond the vocabulary: 0 after exp, and still 0 when multiplied by its value.
_NOWHERE = tl.constexpr(-3.0e38)


@triton.jit
def _place(tile, num_rows, num_columns):
    """Row and column of a tile: the order runs down a few rows, then to the next column."""
    per_band = _ROWS_TOGETHER * num_columns
    first = tile // per_band * _ROWS_TOGETHER
    rows = tl.minimum(num_rows - first, _ROWS_TOGETHER)
    return first + tile % per_band % rows, tile % per_band // rows


@triton.jit
def _products(states, weight, row, column, width, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr):
    """W h of a tile, [BLOCK_T, BLOCK_V]."""
    products = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    for inner in range(tl.cdiv(width, BLOCK_H)):
        left = states.load([row * BLOCK_T, inner * BLOCK_H])
        right = weight.load([column * BLOCK_V, inner * BLOCK_H])
        # "ieee" matters only for float32, which tensor cores would otherwise round to 10 bits.
        products = tl.dot(left, right.T, products, input_precision="ieee")
    return products


@triton.jit
def _logits(
    products,
    bias,
    columns,
    num_columns,
    scale,
    softcap,
    inverse_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Final logits of products [rows, columns], and d logits / d (W h + b)."""
    if HAS_BIAS:
        products += tl.load(bias + columns, mask=columns < num_columns, other=0.0).to(tl.float32)[None, :]
    products *= scale
    slope = scale * inverse_temperature
    if HAS_SOFTCAP:
        # tanh x = 2 σ(2x) − 1: all backends and the interpreter support σ.
        bent = 2.0 * tl.sigmoid(2.0 * products / softcap) - 1.0
        products = bent * softcap
        slope *= 1.0 - bent * bent
    return products * inverse_temperature, slope


@triton.jit
def log_sum_kernel(
    states,
    weight,
    bias,
    greatest_out,
    total_out,
    weighted_out,
    best_out,
    second_out,
    num_tokens,
    vocabulary,
    width,
    scale,
    softcap,
    inverse_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    WITH_GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """max z, Σ e^(z−max) and Σ e^(z−max)·z of every token and tile of the vocabulary, [tiles, T] each.

    ``best_out`` and ``second_out`` [T, tiles · BLOCK_V / GROUP] receive the two greatest logits of every GROUP
    neighbours. The last bits of each logit are its place among them, so that no two are equal.
    """
    num_rows, num_columns = tl.cdiv(num_tokens, BLOCK_T), tl.cdiv(vocabulary, BLOCK_V)
    for tile in tl.range(tl.program_id(0), num_rows * num_columns, PROGRAMS, flatten=True):
        row, column = _place(tile, num_rows, num_columns)
        products = _products(states, weight, row, column, width, BLOCK_T, BLOCK_V, BLOCK_H)
        columns = column * BLOCK_V + tl.arange(0, BLOCK_V)
        logits, _ = _logits(
            products, bias, columns, vocabulary, scale, softcap, inverse_temperature, HAS_BIAS, HAS_SOFTCAP
        )
        logits = tl.where((columns < vocabulary)[None, :], logits, _NOWHERE)
        greatest = tl.max(logits, 1)
        exponentials = tl.exp(logits - greatest[:, None])
        rows = row * BLOCK_T + tl.arange(0, BLOCK_T)
        known = rows < num_tokens
        out = column.to(tl.int64) * num_tokens + rows
        tl.store(greatest_out + out, greatest, mask=known)
        tl.store(total_out + out, tl.sum(exponentials, 1), mask=known)
        if WITH_ENTROPY:
            tl.store(weighted_out + out, tl.sum(exponentials * logits, 1), mask=known)
        if WITH_GROUPS:
            per_tile: tl.constexpr = BLOCK_V // GROUP
            marked = (logits.to(tl.int32, bitcast=True) & -GROUP) | (columns % GROUP)[None, :]
            groups = tl.reshape(marked.to(tl.float32, bitcast=True), [BLOCK_T, per_tile, GROUP])
            best = tl.max(groups, 2)
            second = tl.max(tl.where(groups == best[:, :, None], _NOWHERE, groups), 2)
            places = rows.to(tl.int64)[:, None] * (num_columns * per_tile)
            places += (column * per_tile + tl.arange(0, per_tile))[None, :]
            tl.store(best_out + places, best, mask=known[:, None])
            tl.store(second_out + places, second, mask=known[:, None])


@triton.jit
def _logits_at(
    state,
    weight,
    bias,
    chosen,
    inside,
    vocabulary,
    width,
    scale,
    softcap,
    inverse_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Final logits of one hidden state at ids [BLOCK_N]; −inf where ``inside`` is false."""
    products = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, width, BLOCK_H):
        inner = start + tl.arange(0, BLOCK_H)
        left = tl.load(state + inner, mask=inner < width, other=0.0).to(tl.float32)
        right = tl.load(
            weight + chosen.to(tl.int64)[:, None] * width + inner[None, :],
            mask=inside[:, None] & (inner < width)[None, :],
            other=0.0,
        ).to(tl.float32)
        products += tl.sum(right * left[None, :], 1)
    logits, _ = _logits(
        products[None, :], bias, chosen, vocabulary, scale, softcap, inverse_temperature, HAS_BIAS, HAS_SOFTCAP
    )
    return tl.where(inside, tl.reshape(logits, [BLOCK_N]), float("-inf"))


@triton.jit
def chosen_logits_kernel(
    hidden,
    weight,
    bias,
    ids,
    out,
    num_ids,
    vocabulary,
    width,
    scale,
    softcap,
    inverse_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Final logits at ids [T, n]: a product of one hidden state with a few rows of the weight per program."""
    token = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    chosen = tl.load(ids + token * num_ids + places, mask=places < num_ids, other=0)
    logits = _logits_at(
        hidden + token * width,
        weight,
        bias,
        chosen,
        (places < num_ids) & (chosen < vocabulary),
        vocabulary,
        width,
        scale,
        softcap,
        inverse_temperature,
        HAS_BIAS,
        HAS_SOFTCAP,
        BLOCK_N,
        BLOCK_H,
    )
    tl.store(out + token * num_ids + places, logits, mask=places < num_ids)


@triton.jit
def candidates_kernel(
    hidden,
    weight,
    bias,
    groups,
    best,
    second,
    out,
    num_groups,
    vocabulary,
    width,
    scale,
    softcap,
    inverse_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Logits [T, num_groups, GROUP] of the most probable groups, best first. A group whose second best may also be
    among the num_groups most probable tokens has all its logits; any other has only its best, the rest being −inf."""
    token = tl.program_id(0).to(tl.int64)
    place = token * num_groups + tl.program_id(1)
    members = tl.arange(0, GROUP)
    if tl.load(second + place) <= tl.load(best + token * num_groups + num_groups - 1):
        greatest = tl.load(best + place)
        marked = greatest.to(tl.int32, bitcast=True) & (GROUP - 1)
        tl.store(out + place * GROUP + members, tl.where(members == marked, greatest, float("-inf")))
    else:
        chosen = tl.load(groups + place) * GROUP + members
        logits = _logits_at(
            hidden + token * width,
            weight,
            bias,
            chosen,
            chosen < vocabulary,
            vocabulary,
            width,
            scale,
            softcap,
            inverse_temperature,
            HAS_BIAS,
            HAS_SOFTCAP,
            GROUP,
            BLOCK_H,
        )
        tl.store(out + place * GROUP + members, logits)


@triton.jit
def logprob_gradient_kernel(
    states,
    weight,
    bias,
    ids,
    gradient,
    gradient_sum,
    log_sum,
    out,
    first_column,
    num_columns,
    num_tokens,
    width,
    scale,
    softcap,
    inverse_temperature,
    NUM_IDS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Gradient of W h + b, [T, num_columns], for columns from ``first_column`` on: (Σ_n g_n onehot(id_n) − p Σ g) ·
    slope. ``weight`` and ``bias`` belong to these columns."""
    num_row_tiles, num_column_tiles = tl.cdiv(num_tokens, BLOCK_T), tl.cdiv(num_columns, BLOCK_V)
    for tile in tl.range(tl.program_id(0), num_row_tiles * num_column_tiles, PROGRAMS, flatten=True):
        row, column = _place(tile, num_row_tiles, num_column_tiles)
        products = _products(states, weight, row, column, width, BLOCK_T, BLOCK_V, BLOCK_H)
        columns = column * BLOCK_V + tl.arange(0, BLOCK_V)
        logits, slope = _logits(
            products, bias, columns, num_columns, scale, softcap, inverse_temperature, HAS_BIAS, HAS_SOFTCAP
        )
        rows = row * BLOCK_T + tl.arange(0, BLOCK_T)
        known = rows < num_tokens
        log_sums = tl.load(log_sum + rows, mask=known, other=0.0)
        result = -tl.load(gradient_sum + rows, mask=known, other=0.0)[:, None] * tl.exp(logits - log_sums[:, None])
        for n in tl.static_range(NUM_IDS):
            wanted = tl.load(ids + rows.to(tl.int64) * NUM_IDS + n, mask=known, other=-1) - first_column
            amount = tl.load(gradient + rows.to(tl.int64) * NUM_IDS + n, mask=known, other=0.0)
            result += tl.where(columns[None, :] == wanted[:, None], amount[:, None], 0.0)
        result *= slope
        places = rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
        tl.store(out + places, result.to(out.dtype.element_ty), mask=known[:, None] & (columns < num_columns)[None, :])


@triton.jit
def forward_kl_kernel(
    policy_states,
    policy_weight,
    policy_bias,
    actor_states,
    actor_weight,
    actor_bias,
    policy_greatest_out,
    policy_total_out,
    weighted_out,
    actor_greatest_out,
    actor_total_out,
    num_tokens,
    vocabulary,
    policy_width,
    actor_width,
    policy_scale,
    policy_softcap,
    actor_scale,
    actor_softcap,
    inverse_temperature,
    POLICY_BIAS: tl.constexpr,
    POLICY_SOFTCAP: tl.constexpr,
    ACTOR_BIAS: tl.constexpr,
    ACTOR_SOFTCAP: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    POLICY_H: tl.constexpr,
    ACTOR_H: tl.constexpr,
):
    """Both models' max z and Σ e^(z−max), and Σ e^(z_p − max z_p) (z_p − z_ω), of every token and tile of the
    vocabulary; [tiles, T] each."""
    num_rows, num_columns = tl.cdiv(num_tokens, BLOCK_T), tl.cdiv(vocabulary, BLOCK_V)
    for tile in tl.range(tl.program_id(0), num_rows * num_columns, PROGRAMS):
        row, column = _place(tile, num_rows, num_columns)
        columns = column * BLOCK_V + tl.arange(0, BLOCK_V)
        inside = (columns < vocabulary)[None, :]
        policy, _ = _logits(
            _products(policy_states, policy_weight, row, column, policy_width, BLOCK_T, BLOCK_V, POLICY_H),
            policy_bias,
            columns,
            vocabulary,
            policy_scale,
            policy_softcap,
            inverse_temperature,
            POLICY_BIAS,
            POLICY_SOFTCAP,
        )
        actor, _ = _logits(
            _products(actor_states, actor_weight, row, column, actor_width, BLOCK_T, BLOCK_V, ACTOR_H),
            actor_bias,
            columns,
            vocabulary,
            actor_scale,
            actor_softcap,
            inverse_temperature,
            ACTOR_BIAS,
            ACTOR_SOFTCAP,
        )
        difference = tl.where(inside, policy - actor, 0.0)
        policy = tl.where(inside, policy, _NOWHERE)
        actor = tl.where(inside, actor, _NOWHERE)
        rows = row * BLOCK_T + tl.arange(0, BLOCK_T)
        known = rows < num_tokens
        out = column.to(tl.int64) * num_tokens + rows
        greatest = tl.max(policy, 1)
        exponentials = tl.exp(policy - greatest[:, None])
        tl.store(policy_greatest_out + out, greatest, mask=known)
        tl.store(policy_total_out + out, tl.sum(exponentials, 1), mask=known)
        tl.store(weighted_out + out, tl.sum(exponentials * difference, 1), mask=known)
        greatest = tl.max(actor, 1)
        tl.store(actor_greatest_out + out, greatest, mask=known)
        tl.store(actor_total_out + out, tl.sum(tl.exp(actor - greatest[:, None]), 1), mask=known)


@triton.jit
def forward_kl_gradient_kernel(
    policy_states,
    policy_weight,
    policy_bias,
    actor_states,
    actor_weight,
    actor_bias,
    gradient,
    policy_log_sum,
    actor_log_sum,
    out,
    num_columns,
    num_tokens,
    policy_width,
    actor_width,
    policy_scale,
    policy_softcap,
    actor_scale,
    actor_softcap,
    inverse_temperature,
    POLICY_BIAS: tl.constexpr,
    POLICY_SOFTCAP: tl.constexpr,
    ACTOR_BIAS: tl.constexpr,
    ACTOR_SOFTCAP: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    POLICY_H: tl.constexpr,
    ACTOR_H: tl.constexpr,
):
    """Gradient of the actor's W h + b, [T, num_columns]: g (p_ω − p_new) · slope. Weights and biases belong to these
    columns."""
    num_row_tiles, num_column_tiles = tl.cdiv(num_tokens, BLOCK_T), tl.cdiv(num_columns, BLOCK_V)
    for tile in tl.range(tl.program_id(0), num_row_tiles * num_column_tiles, PROGRAMS):
        row, column = _place(tile, num_row_tiles, num_column_tiles)
        columns = column * BLOCK_V + tl.arange(0, BLOCK_V)
        policy, _ = _logits(
            _products(policy_states, policy_weight, row, column, policy_width, BLOCK_T, BLOCK_V, POLICY_H),
            policy_bias,
            columns,
            num_columns,
            policy_scale,
            policy_softcap,
            inverse_temperature,
            POLICY_BIAS,
            POLICY_SOFTCAP,
        )
        actor, slope = _logits(
            _products(actor_states, actor_weight, row, column, actor_width, BLOCK_T, BLOCK_V, ACTOR_H),
            actor_bias,
            columns,
            num_columns,
            actor_scale,
            actor_softcap,
            inverse_temperature,
            ACTOR_BIAS,
            ACTOR_SOFTCAP,
        )
        rows = row * BLOCK_T + tl.arange(0, BLOCK_T)
        known = rows < num_tokens
        policy_log_sums = tl.load(policy_log_sum + rows, mask=known, other=0.0)
        actor_log_sums = tl.load(actor_log_sum + rows, mask=known, other=0.0)
        amount = tl.load(gradient + rows, mask=known, other=0.0)
        excess = tl.exp(actor - actor_log_sums[:, None]) - tl.exp(policy - policy_log_sums[:, None])
        result = amount[:, None] * excess * slope
        places = rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
        tl.store(out + places, result.to(out.dtype.element_ty), mask=known[:, None] & (columns < num_columns)[None, :])
