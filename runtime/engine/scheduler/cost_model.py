"""Predicts the duration of one model's steps, learnt from measurements: t = a + b·tokens + c·kv_tokens microseconds.

A step in which rows have LoRA adapters takes d + e·adapters longer: the launches of their kernels, and the bytes of each adapter.

A Kalman filter over the coefficients, which drift slowly, in plain floats. Least squares with forgetting would stop adapting or diverge while
all steps are alike, as they are in decode. The last two coefficients are added with the first step that has adapters, so that models without
adapters do not pay for them.
"""

from operator import mul

_WARMUP = 4  # steps before outliers are recognised
_OUTLIER = 4.0  # a measurement is clipped to this multiple of its prediction
_TOKEN_SCALE = 256.0  # keeps the features of similar size, so that the arithmetic is well conditioned
_KV_SCALE = 65536.0
_ADAPTER_SCALE = 8.0
_STEP_SCALE_US = 1000.0
_NOISE = 400.0  # variance of a measurement scaled to 1000 µs: 2 %
_DRIFT = 2.0  # variance that each coefficient gains per step: the model follows a change within about twenty steps
_INITIAL_VARIANCE = 1e6


class CostModel:
    """`slowness`: about how many times slower than a GPU the device is."""

    def __init__(self, base_us: float = 1000.0, token_us: float = 10.0, *, slowness: float = 1.0) -> None:
        # On a GPU a step larger than any before may have waited for its kernels to compile, so it is clipped like other outliers.
        self._compiles = slowness == 1.0
        self._ignorance, self._drift = _INITIAL_VARIANCE * slowness**2, _DRIFT * slowness**2
        self._theta = [base_us * slowness, token_us * slowness * _TOKEN_SCALE, 0.0]
        self._p = [[self._ignorance if i == j else 0.0 for j in range(3)] for i in range(3)]
        self._observations = 0
        self.largest_tokens = 0  # of any measured step; predictions beyond it are extrapolated

    def predict_us(self, tokens: int, kv_tokens: int, adapters: int = 0) -> float:
        """Return the expected duration of a step. `adapters`: the number of different adapters of its rows."""
        theta = self._theta
        own_us = theta[0] + theta[1] * tokens / _TOKEN_SCALE + theta[2] * kv_tokens / _KV_SCALE
        return max(1.0, own_us + self._adapters_us(adapters))

    def _adapters_us(self, adapters: int) -> float:
        if not adapters or len(self._theta) == 3:
            return 0.0
        return self._theta[3] + self._theta[4] * adapters / _ADAPTER_SCALE

    def observe(self, tokens: int, kv_tokens: int, device_us: float, adapters: int = 0) -> None:
        """Learn from a step that took `device_us`."""
        if adapters and len(self._theta) == 3:
            self._add_adapters()
        theta, p = self._theta, self._p
        beyond = tokens > self.largest_tokens
        self.largest_tokens = max(self.largest_tokens, tokens)
        if self._observations >= _WARMUP and (self._compiles or not beyond):
            device_us = min(device_us, _OUTLIER * self.predict_us(tokens, kv_tokens, adapters))
        # Errors are relative, so that the noise of a long prefill does not hide the cost of a decode step.
        scale = _STEP_SCALE_US / max(device_us, 1.0)
        x = [scale, scale * tokens / _TOKEN_SCALE, scale * kv_tokens / _KV_SCALE]
        if len(theta) > 3:
            x += [scale, scale * adapters / _ADAPTER_SCALE] if adapters else [0.0, 0.0]
        error = scale * device_us - _dot(theta, x)
        px = [_dot(row, x) for row in p]
        denominator = _NOISE + _dot(x, px)
        for i, row in enumerate(p):
            gain = px[i] / denominator
            theta[i] += gain * error
            for j, other in enumerate(px):
                row[j] -= gain * other
            row[i] = min(row[i] + self._drift, self._ignorance)
        self._observations += 1

    def _add_adapters(self) -> None:
        """Add the two coefficients of adapters, of which nothing is known yet."""
        for row in self._p:
            row += [0.0, 0.0]
        self._p += [[0.0, 0.0, 0.0, self._ignorance, 0.0], [0.0, 0.0, 0.0, 0.0, self._ignorance]]
        self._theta += [0.0, 0.0]

    def prefill_us(self, start: int, end: int, step_tokens: int) -> float:
        """Return the expected time of a row's tokens from `start` to `end`, in steps of at most `step_tokens`."""
        return sum(self.predict_us(min(end - at, step_tokens), at) for at in range(start, end, step_tokens))

    def tokens_within(self, quantum_us: float, kv_tokens: int, least: int, adapters: int = 0) -> int:
        """Return how many tokens fit into a step of `quantum_us`, at least `least`. `adapters`: the number of different adapters of its rows."""
        a, b, c = self._theta[:3]
        per_token_us = max(b / _TOKEN_SCALE, 1e-3)
        left_us = quantum_us - max(a, 0.0) - max(c, 0.0) * kv_tokens / _KV_SCALE - max(self._adapters_us(adapters), 0.0)
        return max(least, int(left_us / per_token_us))


def _dot(a: list[float], b: list[float]) -> float:
    product: float = sum(map(mul, a, b))
    return product
