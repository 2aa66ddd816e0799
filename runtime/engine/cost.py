"""What a step of one model takes: t = a + b·tokens + c·kv_tokens microseconds, learnt while it runs.

Recursive least squares with forgetting, three unknowns, plain floats. Knows no clock: whoever measured a step tells it.
"""

_FORGET = 0.98
_WARMUP = 4                     # steps before an outlier is told from a change
_OUTLIER = 4.0                  # a step this many times dearer than foreseen teaches no more than that
_TOKEN_SCALE = 256.0            # features of like size keep the arithmetic well conditioned
_KV_SCALE = 65536.0
_COVARIANCE_CEILING = 1e9


class CostModel:
    def __init__(self, base_us: float = 1000.0, token_us: float = 10.0) -> None:
        self._theta = [base_us, token_us * _TOKEN_SCALE, 0.0]
        self._p = [[1e6, 0.0, 0.0], [0.0, 1e6, 0.0], [0.0, 0.0, 1e6]]
        self.observations = 0

    def predict_us(self, tokens: int, kv_tokens: int) -> float:
        a, b, c = self._theta
        return max(1.0, a + b * tokens / _TOKEN_SCALE + c * kv_tokens / _KV_SCALE)

    def observe(self, tokens: int, kv_tokens: int, device_us: float) -> None:
        x = (1.0, tokens / _TOKEN_SCALE, kv_tokens / _KV_SCALE)
        theta, p = self._theta, self._p
        if self.observations >= _WARMUP:
            device_us = min(device_us, _OUTLIER * self.predict_us(tokens, kv_tokens))
        error = device_us - (theta[0] * x[0] + theta[1] * x[1] + theta[2] * x[2])
        px = [row[0] * x[0] + row[1] * x[1] + row[2] * x[2] for row in p]
        denominator = _FORGET + x[0] * px[0] + x[1] * px[1] + x[2] * px[2]
        gain = [v / denominator for v in px]
        for i in range(3):
            theta[i] += gain[i] * error
        # steps that are all alike would let the covariance grow without end: then nothing is forgotten
        scale = 1.0 if p[0][0] + p[1][1] + p[2][2] > _COVARIANCE_CEILING else 1.0 / _FORGET
        self._p = [[(p[i][j] - gain[i] * px[j]) * scale for j in range(3)] for i in range(3)]
        self.observations += 1

    def tokens_within(self, quantum_us: float, kv_tokens: int, least: int) -> int:
        """Tokens that a step may have to stay within `quantum_us`; never fewer than `least`."""
        a, b, c = self._theta
        per_token_us = max(b / _TOKEN_SCALE, 1e-3)
        return max(least, int((quantum_us - max(a, 0.0) - max(c, 0.0) * kv_tokens / _KV_SCALE) / per_token_us))
