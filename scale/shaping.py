"""Scores as the policy is trained on them: the verifier's, less what length and a missing answer cost."""

from __future__ import annotations

from scale.config import RewardConfig
from scale.rewards import NO_ANSWER
from tppo_ref.method.records import Response
from tppo_ref.rollout.turns import transcript
from tppo_ref.runs.build import TaskScorer


def shaped(score: float, response: Response, config: RewardConfig, *, cap: int, answered: bool) -> float:
    """The score that the policy is trained on.

        score - penalty x min(1, max(0, L - (cap - buffer)) / buffer) - format_penalty [no answer]       L: tokens of all turns

    The soft overlong penalty of DAPO (arXiv 2503.14476, eq. 13): 0 up to cap - buffer, `overlong_penalty` at the cap.
    """
    if config.overlong_buffer:
        over = max(0, len(transcript(response)) - (cap - config.overlong_buffer))
        score -= config.overlong_penalty * min(1.0, over / config.overlong_buffer)
    return score - (0.0 if answered else config.format_penalty)


class Shaped:
    """A scorer whose scores are shaped: what training gets. Evaluation gets the scorer itself.

    graded   the verifier is scale.rewards.grade, whose NO_ANSWER counts as wrong, -1, less reward.format_penalty. A user's own
             verifier may mean -2 when it says -2
    """

    def __init__(self, scorer: TaskScorer, config: RewardConfig, *, cap: int, graded: bool):
        self.scorer, self.config, self.cap, self.graded = scorer, config, cap, graded
        self._submitted: dict[int, Response] = {}

    def submit(self, response: Response) -> None:
        self._submitted[response.id] = response
        self.scorer.submit(response)

    def collect(self) -> dict[int, tuple[float, str]]:
        responses, self._submitted = self._submitted, {}
        return {id: (self._shape(score, responses[id]), status) for id, (score, status) in self.scorer.collect().items()}

    def _shape(self, score: float, response: Response) -> float:
        answered = not (self.graded and score == NO_ANSWER)
        return shaped(score if answered else -1.0, response, self.config, cap=self.cap, answered=answered)

    def close(self) -> None:
        self.scorer.close()
