"""The Triton programs behind :mod:`jackpot.algorithm.vocabulary_triton`: tiles of logits that stay on the chip.

Each program makes [BLOCK_T, BLOCK_V] logits at a time from hidden states and output layer, in float32, and reduces
them before it makes the next: logits never reach memory, except as one tile's gradient in the backward pass.
"""

import triton
import triton.language as tl


@triton.jit
def _logits_tile(
    hidden,
    weight,
    bias,
    rows,
    columns,
    num_tokens,
    vocabulary,
    width,
    scale,
    softcap,
    inverse_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Final logits [BLOCK_T, BLOCK_V], and d logits / d (W h + b) in the same shape."""
    products = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    # 64-bit rows: vocabulary × width passes 2³¹ in the largest models.
    hidden_rows = hidden + rows.to(tl.int64)[:, None] * width
    weight_rows = weight + columns.to(tl.int64)[None, :] * width
    for start in range(0, width, BLOCK_H):
        inner = start + tl.arange(0, BLOCK_H)
        left = tl.load(
            hidden_rows + inner[None, :], mask=(rows < num_tokens)[:, None] & (inner < width)[None, :], other=0.0
        )
        right = tl.load(
            weight_rows + inner[:, None], mask=(columns < vocabulary)[None, :] & (inner < width)[:, None], other=0.0
        )
        # "ieee" matters for float32 alone, which tensor cores would otherwise round to 10 bits.
        products = tl.dot(left, right, products, input_precision="ieee")
    if HAS_BIAS:
        products += tl.load(bias + columns, mask=columns < vocabulary, other=0.0).to(tl.float32)[None, :]
    products *= scale
    slope = tl.full([BLOCK_T, BLOCK_V], 1.0, tl.float32) * (scale * inverse_temperature)
    if HAS_SOFTCAP:
        # tanh x = 2 σ(2x) − 1: every backend and the interpreter have σ.
        bent = 2.0 * tl.sigmoid(2.0 * products / softcap) - 1.0
        products = bent * softcap
        slope *= 1.0 - bent * bent
    return products * inverse_temperature, slope


@triton.jit
def log_sum_kernel(
    hidden,
    weight,
    bias,
    greatest_out,
    total_out,
    weighted_out,
    groups_out,
    num_tokens,
    vocabulary,
    width,
    num_tiles,
    tiles_per_split,
    scale,
    softcap,
    inverse_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    WITH_GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Online logsumexp over a split of the vocabulary: per token and split max z, Σ e^(z−max) and Σ e^(z−max)·z.

    ``groups_out`` [T, num_tiles · BLOCK_V / GROUP] gets the greatest logit of every GROUP neighbours.
    """
    # Tokens vary fastest, so that programs that run at the same time share a tile of the weight in the cache.
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tl.program_id(1)
    greatest = tl.full([BLOCK_T], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    weighted = tl.zeros([BLOCK_T], tl.float32)
    for tile in range(split * tiles_per_split, tl.minimum((split + 1) * tiles_per_split, num_tiles)):
        columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        logits, _ = _logits_tile(
            hidden,
            weight,
            bias,
            rows,
            columns,
            num_tokens,
            vocabulary,
            width,
            scale,
            softcap,
            inverse_temperature,
            HAS_BIAS,
            HAS_SOFTCAP,
            BLOCK_T,
            BLOCK_V,
            BLOCK_H,
        )
        inside = (columns < vocabulary)[None, :]
        logits = tl.where(inside, logits, float("-inf"))
        higher = tl.maximum(greatest, tl.max(logits, 1))
        shrink = tl.exp(greatest - higher)
        exponentials = tl.exp(logits - higher[:, None])
        total = total * shrink + tl.sum(exponentials, 1)
        if WITH_ENTROPY:
            weighted = weighted * shrink + tl.sum(exponentials * tl.where(inside, logits, 0.0), 1)
        greatest = higher
        if WITH_GROUPS:
            per_tile: tl.constexpr = BLOCK_V // GROUP
            best = tl.max(tl.reshape(logits, [BLOCK_T, per_tile, GROUP]), 2)
            places = tile * per_tile + tl.arange(0, per_tile)
            group_rows = groups_out + rows.to(tl.int64)[:, None] * (num_tiles * per_tile)
            tl.store(group_rows + places[None, :], best, mask=(rows < num_tokens)[:, None])
    out = split * num_tokens + rows
    tl.store(greatest_out + out, greatest, mask=rows < num_tokens)
    tl.store(total_out + out, total, mask=rows < num_tokens)
    if WITH_ENTROPY:
        tl.store(weighted_out + out, weighted, mask=rows < num_tokens)


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
    # Ids beyond the vocabulary belong to the rim of the last tile; they are never the most probable.
    inside = (places < num_ids) & (chosen < vocabulary)
    products = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, width, BLOCK_H):
        inner = start + tl.arange(0, BLOCK_H)
        state = tl.load(hidden + token * width + inner, mask=inner < width, other=0.0).to(tl.float32)
        rows = tl.load(
            weight + chosen[:, None] * width + inner[None, :],
            mask=inside[:, None] & (inner < width)[None, :],
            other=0.0,
        ).to(tl.float32)
        products += tl.sum(rows * state[None, :], 1)
    if HAS_BIAS:
        products += tl.load(bias + chosen, mask=inside, other=0.0).to(tl.float32)
    products *= scale
    if HAS_SOFTCAP:
        products = (2.0 * tl.sigmoid(2.0 * products / softcap) - 1.0) * softcap
    logits = tl.where(inside, products * inverse_temperature, float("-inf"))
    tl.store(out + token * num_ids + places, logits, mask=places < num_ids)


@triton.jit
def logprob_gradient_kernel(
    hidden,
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
    vocabulary,
    width,
    scale,
    softcap,
    inverse_temperature,
    NUM_IDS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Gradient of W h + b, [T, num_columns] from ``first_column`` on: (Σ_n g_n onehot(id_n) − p Σ g) · slope."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    local = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    columns = first_column + local
    logits, slope = _logits_tile(
        hidden,
        weight,
        bias,
        rows,
        columns,
        num_tokens,
        vocabulary,
        width,
        scale,
        softcap,
        inverse_temperature,
        HAS_BIAS,
        HAS_SOFTCAP,
        BLOCK_T,
        BLOCK_V,
        BLOCK_H,
    )
    known = rows < num_tokens
    log_sums = tl.load(log_sum + rows, mask=known, other=0.0)
    result = -tl.load(gradient_sum + rows, mask=known, other=0.0)[:, None] * tl.exp(logits - log_sums[:, None])
    for n in tl.static_range(NUM_IDS):
        wanted = tl.load(ids + rows.to(tl.int64) * NUM_IDS + n, mask=known, other=-1)
        amount = tl.load(gradient + rows.to(tl.int64) * NUM_IDS + n, mask=known, other=0.0)
        result += tl.where(columns[None, :] == wanted[:, None], amount[:, None], 0.0)
    result *= slope
    places = rows.to(tl.int64)[:, None] * num_columns + local[None, :]
    tl.store(out + places, result.to(out.dtype.element_ty), mask=known[:, None] & (local < num_columns)[None, :])


@triton.jit
def forward_kl_kernel(
    policy_hidden,
    policy_weight,
    policy_bias,
    actor_hidden,
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
    num_tiles,
    tiles_per_split,
    policy_scale,
    policy_softcap,
    actor_scale,
    actor_softcap,
    inverse_temperature,
    POLICY_BIAS: tl.constexpr,
    POLICY_SOFTCAP: tl.constexpr,
    ACTOR_BIAS: tl.constexpr,
    ACTOR_SOFTCAP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Both models' logsumexp and Σ e^(z_p − max z_p) (z_p − z_ω) over a split of the vocabulary, in one sweep."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tl.program_id(1)
    policy_greatest = tl.full([BLOCK_T], float("-inf"), tl.float32)
    actor_greatest = tl.full([BLOCK_T], float("-inf"), tl.float32)
    policy_total = tl.zeros([BLOCK_T], tl.float32)
    actor_total = tl.zeros([BLOCK_T], tl.float32)
    weighted = tl.zeros([BLOCK_T], tl.float32)
    for tile in range(split * tiles_per_split, tl.minimum((split + 1) * tiles_per_split, num_tiles)):
        columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        inside = (columns < vocabulary)[None, :]
        policy, _ = _logits_tile(
            policy_hidden,
            policy_weight,
            policy_bias,
            rows,
            columns,
            num_tokens,
            vocabulary,
            policy_width,
            policy_scale,
            policy_softcap,
            inverse_temperature,
            POLICY_BIAS,
            POLICY_SOFTCAP,
            BLOCK_T,
            BLOCK_V,
            BLOCK_H,
        )
        actor, _ = _logits_tile(
            actor_hidden,
            actor_weight,
            actor_bias,
            rows,
            columns,
            num_tokens,
            vocabulary,
            actor_width,
            actor_scale,
            actor_softcap,
            inverse_temperature,
            ACTOR_BIAS,
            ACTOR_SOFTCAP,
            BLOCK_T,
            BLOCK_V,
            BLOCK_H,
        )
        difference = tl.where(inside, policy - actor, 0.0)
        policy = tl.where(inside, policy, float("-inf"))
        actor = tl.where(inside, actor, float("-inf"))
        higher = tl.maximum(policy_greatest, tl.max(policy, 1))
        exponentials = tl.exp(policy - higher[:, None])
        shrink = tl.exp(policy_greatest - higher)
        policy_total = policy_total * shrink + tl.sum(exponentials, 1)
        weighted = weighted * shrink + tl.sum(exponentials * difference, 1)
        policy_greatest = higher
        higher = tl.maximum(actor_greatest, tl.max(actor, 1))
        actor_total = actor_total * tl.exp(actor_greatest - higher) + tl.sum(tl.exp(actor - higher[:, None]), 1)
        actor_greatest = higher
    out = split * num_tokens + rows
    known = rows < num_tokens
    tl.store(policy_greatest_out + out, policy_greatest, mask=known)
    tl.store(policy_total_out + out, policy_total, mask=known)
    tl.store(weighted_out + out, weighted, mask=known)
    tl.store(actor_greatest_out + out, actor_greatest, mask=known)
    tl.store(actor_total_out + out, actor_total, mask=known)


@triton.jit
def forward_kl_gradient_kernel(
    policy_hidden,
    policy_weight,
    policy_bias,
    actor_hidden,
    actor_weight,
    actor_bias,
    gradient,
    policy_log_sum,
    actor_log_sum,
    out,
    first_column,
    num_columns,
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
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Gradient of the actor's W h + b, [T, num_columns] from ``first_column`` on: g (p_ω − p_new) · slope."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    local = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    columns = first_column + local
    policy, _ = _logits_tile(
        policy_hidden,
        policy_weight,
        policy_bias,
        rows,
        columns,
        num_tokens,
        vocabulary,
        policy_width,
        policy_scale,
        policy_softcap,
        inverse_temperature,
        POLICY_BIAS,
        POLICY_SOFTCAP,
        BLOCK_T,
        BLOCK_V,
        BLOCK_H,
    )
    actor, slope = _logits_tile(
        actor_hidden,
        actor_weight,
        actor_bias,
        rows,
        columns,
        num_tokens,
        vocabulary,
        actor_width,
        actor_scale,
        actor_softcap,
        inverse_temperature,
        ACTOR_BIAS,
        ACTOR_SOFTCAP,
        BLOCK_T,
        BLOCK_V,
        BLOCK_H,
    )
    known = rows < num_tokens
    policy_log_sums = tl.load(policy_log_sum + rows, mask=known, other=0.0)
    actor_log_sums = tl.load(actor_log_sum + rows, mask=known, other=0.0)
    amount = tl.load(gradient + rows, mask=known, other=0.0)
    excess = tl.exp(actor - actor_log_sums[:, None]) - tl.exp(policy - policy_log_sums[:, None])
    result = amount[:, None] * excess * slope
    places = rows.to(tl.int64)[:, None] * num_columns + local[None, :]
    tl.store(out + places, result.to(out.dtype.element_ty), mask=known[:, None] & (local < num_columns)[None, :])
