"""Predicts the duration of one model's steps, learnt from measurements: t = a + b·tokens + c·kv_tokens microseconds.

A Kalman filter over the three coefficients, which drift slowly, in plain floats. Least squares with forgetting would stop adapting or diverge while
all steps are alike, as they are in decode.
"""

_WARMUP = 4  # steps before outliers are recognised
_OUTLIER = 4.0  # a measurement is clipped to this multiple of its prediction
_TOKEN_SCALE = 256.0  # keeps the features of similar size, so that the arithmetic is well conditioned
_KV_SCALE = 65536.0
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
        self._p = [[self._ignorance, 0.0, 0.0], [0.0, self._ignorance, 0.0], [0.0, 0.0, self._ignorance]]
        self._observations = 0
        self.largest_tokens = 0  # of any measured step; predictions beyond it are extrapolated

    def predict_us(self, tokens: int, kv_tokens: int) -> float:
        a, b, c = self._theta
        return max(1.0, a + b * tokens / _TOKEN_SCALE + c * kv_tokens / _KV_SCALE)

    def observe(self, tokens: int, kv_tokens: int, device_us: float) -> None:
        theta, p = self._theta, self._p
        beyond = tokens > self.largest_tokens
        self.largest_tokens = max(self.largest_tokens, tokens)
        if self._observations >= _WARMUP and (self._compiles or not beyond):
            device_us = min(device_us, _OUTLIER * self.predict_us(tokens, kv_tokens))
        # Errors are relative, so that the noise of a long prefill does not hide the cost of a decode step.
        scale = _STEP_SCALE_US / max(device_us, 1.0)
        x = (scale, scale * tokens / _TOKEN_SCALE, scale * kv_tokens / _KV_SCALE)
        error = scale * device_us - (theta[0] * x[0] + theta[1] * x[1] + theta[2] * x[2])
        px = [row[0] * x[0] + row[1] * x[1] + row[2] * x[2] for row in p]
        denominator = _NOISE + x[0] * px[0] + x[1] * px[1] + x[2] * px[2]
        gain = [v / denominator for v in px]
        for i in range(3):
            theta[i] += gain[i] * error
        for i in range(3):
            for j in range(3):
                p[i][j] -= gain[i] * px[j]
            p[i][i] = min(p[i][i] + self._drift, self._ignorance)
        self._observations += 1

    def tokens_within(self, quantum_us: float, kv_tokens: int, least: int) -> int:
        """Return how many tokens fit into a step of `quantum_us`, at least `least`."""
        a, b, c = self._theta
        per_token_us = max(b / _TOKEN_SCALE, 1e-3)
        return max(least, int((quantum_us - max(a, 0.0) - max(c, 0.0) * kv_tokens / _KV_SCALE) / per_token_us))
