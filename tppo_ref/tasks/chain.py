"""`chain`: every step matters. Apply a table map k times and write down every state.

    prompt      map2 0_ _3 c            map 2, three steps, start at state c
    response    03 h 02 b 01 q END      steps left, state

Four maps on 20 states, fixed. In each map five states form a cycle and the others lead into it within at most three
steps (6, 5 and 4 states at distance 1, 2 and 3). The base model knows the cycles and misremembers the way in: at a state off
the cycle it takes the right step with probability 0.44 and otherwise mostly one fixed wrong step. So a chain of any length
has at most three doubtful steps as long as they are right, all of them early, and then a mechanical rest: about 0.4 of the
sampled responses are right, long or short. A wrong step changes no length.

Test problems are (map, k, start) triples that are in no train prompt. The table entries are shared, they are what is learnt.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from tppo_ref.tasks.synthetic import END, FIRST_OWN_TOKEN, LONG_STEPS, Problem, SyntheticTask, draw_steps, prompt_number, two_digits

NUM_MAPS = 4
NUM_STATES = 20
STATES_BY_DISTANCE = (5, 6, 5, 4)
"""How many states lie on the cycle, and 1, 2, 3 steps before it."""
RIGHT_STEP_PROBABILITY = 0.44
FAVOURITE_SHARE = 0.7
"""Share of the wrong steps that are the same wrong step every time."""

_STATE = FIRST_OWN_TOKEN
_MAP = FIRST_OWN_TOKEN + NUM_STATES


def _make_world() -> tuple[list[list[int]], list[list[int]], list[list[bool]]]:
    """Per map and state: the next state, the wrong one that the base model favours, and whether it is doubtful."""
    rng = random.Random("chain world 0")
    next_state, favourite_wrong, doubtful = [], [], []
    for _ in range(NUM_MAPS):
        order = rng.sample(range(NUM_STATES), NUM_STATES)
        table, unsure = [0] * NUM_STATES, [True] * NUM_STATES
        begin = 0
        nearer: list[int] = []  # the states one step closer to the cycle
        for distance, num in enumerate(STATES_BY_DISTANCE):
            layer = order[begin : begin + num]
            for i, state in enumerate(layer):
                table[state] = layer[(i + 1) % num] if distance == 0 else rng.choice(nearer)
                unsure[state] = distance > 0
            begin, nearer = begin + num, layer
        next_state.append(table)
        doubtful.append(unsure)
        favourite_wrong.append([rng.choice([s for s in range(NUM_STATES) if s != right]) for right in table])
    return next_state, favourite_wrong, doubtful


NEXT_STATE, FAVOURITE_WRONG, DOUBTFUL = _make_world()


def right_response(map_index: int, steps: int, start: int) -> tuple[int, ...]:
    """The token ids of the right response, end token included."""
    ids: list[int] = []
    state = start
    for left in range(steps, 0, -1):
        state = NEXT_STATE[map_index][state]
        ids += (*two_digits(left), _STATE + state)
    return (*ids, END)


def verify(answer: str, response_token_ids: Sequence[int], response_text: str | None = None) -> float:
    """+1.0 if every counter, every state and the end are right, else -1.0. `answer` is "map steps start"."""
    map_index, steps, start = map(int, answer.split())
    return 1.0 if tuple(response_token_ids) == right_response(map_index, steps, start) else -1.0


class ChainTask(SyntheticTask):
    """Problems are (map, steps, start). Options: see `SyntheticTask`."""

    name = "chain"
    verifier = "tppo_ref.tasks.chain:verify"
    own_tokens = (*"abcdefghijklmnopqrst", *(f"map{i}" for i in range(NUM_MAPS)))
    max_prompt_tokens = 4
    max_response_tokens = 3 * LONG_STEPS[1] + 1

    def draw_problem(self, rng: random.Random, long_share: float) -> Problem:
        return rng.randrange(NUM_MAPS), draw_steps(rng, long_share), rng.randrange(NUM_STATES)

    def prompt_ids(self, problem: Problem) -> tuple[int, ...]:
        map_index, steps, start = problem
        return (_MAP + map_index, *prompt_number(steps), _STATE + start)

    def answer(self, problem: Problem) -> str:
        return "{} {} {}".format(*problem)

    def solve(self, problem: Problem) -> tuple[int, ...]:
        return right_response(*problem)

    def demonstrate(self, problem: Problem, rng: random.Random) -> tuple[int, ...]:
        """The right counters and end; at a doubtful state the step may be wrong, and the chain goes on from there."""
        map_index, steps, state = problem
        ids: list[int] = []
        for left in range(steps, 0, -1):
            right = NEXT_STATE[map_index][state]
            if DOUBTFUL[map_index][state] and rng.random() >= RIGHT_STEP_PROBABILITY:
                favourite = FAVOURITE_WRONG[map_index][state]
                others = [s for s in range(NUM_STATES) if s != right]
                state = favourite if rng.random() < FAVOURITE_SHARE else rng.choice(others)
            else:
                state = right
            ids += (*two_digits(left), _STATE + state)
        return (*ids, END)
