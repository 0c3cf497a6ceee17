"""The words of one transformer block, forward and backward, summed over ranks: the formulas of docs/design.rst."""


def block_words(mode, sizes, b, s, h, a, d, f, keep_gathered=True):
    """Return the words of a block with heads a of width d and an MLP of width f, on a grid of `sizes` by axis."""
    r, c, q = (sizes.get(axis, 1) for axis in ("row", "col", "depth"))
    n, e = b * s, a * d
    weights = 4 * e * h + 2 * h * f
    vectors_inside, vectors_of_stream = 3 * e + f, 6 * h
    if mode in ("1d", "3d"):
        once = 4 * n * h * (c - 1) + n * (4 * e + 2 * f) * (q - 1) + weights * (r - 1)
        again = 2 * n * h * (c - 1) + n * (e + f) * (q - 1) + weights * (r - 1)
        vectors = 2 * vectors_inside * (r * q - 1) + 2 * vectors_of_stream * (r * c - 1)
        norms = 16 * n * (q - 1)
    else:
        once = again = n * (2 * h + e + f) * (c - 1) + weights * q * (r - 1)
        vectors = 2 * (vectors_inside + vectors_of_stream) * (r * q - 1) + 2 * weights * (q - 1)
        norms = 16 * n * (c - 1)
    return 2 * once + vectors + norms + (0 if keep_gathered else again)


def recompute_words(mode, sizes, b, s, h, a, d, f, kinds, keep_gathered=True):
    """Return the additional words of a block that is recomputed, or whose norms and activation are.

    The recomputation does not reduce the last product's result, and gathers its operands only if they are kept
    gathered.
    """
    r, c, q = (sizes.get(axis, 1) for axis in ("row", "col", "depth"))
    n, e, one_map = b * s, a * d, mode in ("1d", "3d")
    norms = 8 * n * ((q if one_map else c) - 1)
    if kinds == "selective":
        gathered = 2 * n * h * (c - 1) + n * f * ((q if one_map else c) - 1)
        return norms + (gathered if keep_gathered else 0)
    last = 0 if keep_gathered else n * f * ((q if one_map else c) - 1) + h * f * (1 if one_map else q) * (r - 1)
    weights, bias = 4 * e * h + 2 * h * f, 3 * e * (r * q - 1 if one_map else q * (r - 1))  # heads have a matrix bias
    if one_map:
        return norms + bias + 3 * n * h * (c - 1) + n * (4 * e + 2 * f) * (q - 1) + weights * (r - 1) - last
    return norms + bias + n * (2 * h + e + f) * (c - 1) + weights * q * (r - 1) - last


def grouped_words(mode, sizes, b, s, h, a, g, d, cut):
    """Return the words of self-attention with a heads in g groups, where the letter `cut`, g or r, is cut."""
    r, c, q = (sizes.get(axis, 1) for axis in ("row", "col", "depth"))
    n, e, u = b * s, a * d, 2 * g * d
    copies = c if cut == "r" else 1
    # Weight and bias of keys and values, stored cut over the axes that cut r, are gathered over them, too.
    shared_weight, shared_bias = (q * r * (copies - 1) * size for size in (h * u, u))
    moved = 2 * n * u * (copies - 1) + 2 * (e + u) * (r * q - 1) + shared_bias
    if mode in ("1d", "3d"):
        once = 2 * n * h * (c - 1) + n * (2 * e + copies * u) * (q - 1) + h * (2 * e + u) * (r - 1)
        return 2 * once + moved + shared_weight // q + 2 * h * (r * c - 1)
    once = n * (h + e) * (c - 1) + q * h * (2 * e + u) * (r - 1)
    return 2 * once + moved + shared_weight + 2 * (q - 1) * h * (2 * e + u) + 2 * h * (r * q - 1)


def moe_words(template, sizes, b, s, h, f, experts, top_k, slots, pairs, balance_over):
    """Return the words of a mixture of experts with losses, forward and backward, `slots` for each expert and block.

    The losses are reported.
    """
    d, r, c, q = (sizes.get(axis, 1) for axis in ("data", "row", "col", "depth"))
    t = sizes.get("seq", 1) * sizes.get("ulysses", 1)  # weights are replicated over both
    over_b, over_s, over_h = (d * r, t * c, q) if template == "A" else (d * q * r, t, c)
    blocks = over_b * over_s
    n, everything = b * s, experts * blocks * slots
    up, down = pairs * f, f
    weights, router = t * experts * h * (up + down), t * d * h * experts
    dispatch, back = everything * h * (c - 1 / d), everything * h * (1 - 1 / d)
    if template == "A":
        inside = 2 * (2 * dispatch + everything * (up + down) * (q - 1) + weights * (r - 1))
        once = 2 * router * (r * c - 1)
    else:
        inside = 2 * (dispatch + back + everything * down * (c - 1) + q * weights * (r - 1)) + 2 * (q - 1) * weights
        once = 2 * q * router * (r - 1) + 2 * (q - 1) * router
    capacity = 2 * (blocks - 1) * over_h
    sums = 2 * b * (2 * experts + 2) * (over_s - 1) * over_h
    together = 2 * (over_b - 1) * over_s * over_h * (2 + (experts + 1 if balance_over == "microbatch" else 0))
    return inside + once + 2 * n * (experts + top_k) * (over_h - 1) + capacity + sums + together
