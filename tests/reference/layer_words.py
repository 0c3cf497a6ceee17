"""The words of each layer, forward and backward, summed over ranks, on data=1: the formulas of the docstrings."""


def layer_words(name, template, grid, n):
    """Return the words of a case of `layer_case`, of sizes `n`, on a grid of sizes by axis.

    A product moves its stream (over col), its inside (over depth in template A, over col in B) and its weight.
    """
    r, c, q = (grid.get(axis, 1) for axis in ("row", "col", "depth"))
    a = template == "A"
    b, s, h, f, v = (n[x] for x in "bshfv")

    def weight(size):  # it is gathered, and its gradient reduced
        return 2 * (r - 1) * size if a else 2 * q * (r - 1) * size + 2 * (q - 1) * size

    def inner_vector(size):
        return 2 * (r * q - 1) * size

    def vector(size):  # a vector of the stream, of which col cuts a dim in template A
        return 2 * (r * c - 1) * size if a else inner_vector(size)

    def replicated_vector(size):  # a vector of images, which col does not cut in template A
        return 2 * c * (r - 1) * size if a else inner_vector(size)

    def statistics(size):  # an allreduce over the axes that cut h
        return 2 * ((q if a else c) - 1) * size

    def up(x, y, w):  # x, y, w: numbers of elements of input, result and weight
        return 2 * (c - 1) * x + (2 * (q - 1) * y if a else 0) + weight(w)

    def down(x, y, w):
        return (2 * (q - 1) * x + 2 * (c - 1) * y if a else 2 * (c - 1) * x) + weight(w)

    def table(rows, size):  # a table whose rows col cuts in template A
        return 2 * (r * c - 1) * rows * size if a else weight(rows * size)

    def patches():  # images and their cotangents are replicated
        count, kernel = 1 + (n["y"] // n["k"]) * (n["x"] // n["k"]), n["c"] * n["k"] ** 2
        stream = 2 * (c - 1) * b * count * h if a else 0
        cotangent = ((q if a else c) - 1 + r * c * q - 1) * image * n["c"]
        return stream + cotangent + weight(kernel * h) + 2 * replicated_vector(h) + table(count + 2, h)

    rows, first = b * s, (c - 1) * b * h if a else 0
    classes = up(b * h, b * v, h * v) + inner_vector(v)
    height, width = n["y"] - 2, n["x"] - 1  # windows of a kernel (3, 2)
    strided = b * h * ((n["y"] - 1) // 2 + 1) * ((n["x"] + 1) // 3 + 1)  # kernel 3, strides (2, 3), padding (1, 2)
    image = b * n["y"] * n["x"]
    formulas = {
        "up": up(rows * h, rows * f, h * f) + inner_vector(f),
        "down": down(rows * f, rows * h, f * h) + vector(h),
        "gates": up(rows * h, 2 * rows * f, 2 * h * f) + inner_vector(2 * f),
        "mlp-swiglu": up(rows * h, 2 * rows * f, 2 * h * f) + down(rows * f, rows * h, f * h),
        "layer-norm": 4 * statistics(rows) + vector(2 * h),
        "rms-norm": 2 * statistics(rows) + vector(h),
        "softmax": 6 * (c - 1) * rows,
        "embedding": (2 * (c - 1) * rows * h if a else 0) + weight(v * h),
        "positions": table(s + 2, h),
        "first-classes": first + classes,
        "mean-classes": 2 * first + classes,
        "convolution": up(image * h, b * f * height * width, h * 6 * f) + inner_vector(f),
        "convolution-back": down(image * f, strided, f * 9 * h) + replicated_vector(h),
        "patches-positions": patches(),
    }
    return formulas.get(name, 0)


MOVED = (
    *("up", "down", "gates", "mlp-swiglu", "layer-norm", "rms-norm", "softmax", "embedding", "positions"),
    *("first-classes", "mean-classes", "convolution", "convolution-back", "patches-positions"),
)
LOCAL = (
    *("gelu-tanh", "gelu", "gelu-sigmoid", "silu", "relu", "swiglu", "dropout", "dropout-inside", "drop-path"),
    *("max-pool-overlapping", "max-pool-gaps", "mean-pool"),
)
