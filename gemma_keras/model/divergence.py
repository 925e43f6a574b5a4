"""How far a student's next-token distribution is from a teacher's.

Sources: Hinton et al., 2015 (arXiv:1503.02531) for the temperature; Agarwal et al., 2023
(arXiv:2306.13649, eq. 1) for the generalized Jensen-Shannon divergence.
"""

from __future__ import annotations

from keras import ops

FORWARD, REVERSE = "forward", "reverse"
_LEAST_MASS = 1e-7  # of what is not among a teacher's likeliest tokens


def divergences(log_p, log_q, kind: str | float):
    """The divergence of each pair of distributions, in nats.

    Args:
        log_p: float32 `(..., outcomes)`, log-probabilities of the teacher.
        log_q: of the student.
        kind: `"forward"`, KL(p || q); `"reverse"`, KL(q || p); or the share b of the generalized
            Jensen-Shannon divergence b KL(p || m) + (1 - b) KL(q || m), where m = b p + (1 - b) q.

    Returns:
        float32 `(...)`.
    """
    if kind == FORWARD:
        return _kl(log_p, log_q)
    if kind == REVERSE:
        return _kl(log_q, log_p)
    assert not isinstance(kind, str)
    log_m = ops.logaddexp(log_p + ops.log(kind), log_q + ops.log(1.0 - kind))
    return kind * _kl(log_p, log_m) + (1.0 - kind) * _kl(log_q, log_m)


def _kl(log_p, log_q):
    return ops.sum(ops.exp(log_p) * (log_p - log_q), axis=-1)


def log_probabilities(logits, temperature: float):
    """Log-probabilities of logits over a temperature, in float32."""
    return ops.log_softmax(ops.cast(logits, "float32") / temperature, axis=-1)


def of_likeliest(log_q, ids, log_p):
    """Two distributions over a teacher's likeliest tokens, and all others as one outcome.

    By the data-processing inequality their KL divergence is at most that of the whole ones.

    Args:
        log_q: float32 `(..., vocabulary_size)`, the student's log-probabilities.
        ids: int32 `(..., k)`.
        log_p: float32 `(..., k)`, the teacher's of these.

    Returns:
        Log-probabilities of the teacher and of the student, `(..., k + 1)` each.
    """
    chosen = ops.take_along_axis(log_q, ids, axis=-1)
    return _with_rest(log_p), _with_rest(chosen)


def _with_rest(log_p):
    rest = 1.0 - ops.sum(ops.exp(log_p), axis=-1, keepdims=True)
    return ops.concatenate([log_p, ops.log(ops.maximum(rest, _LEAST_MASS))], axis=-1)
