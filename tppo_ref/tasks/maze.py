"""`maze`: every second move counts, and a wrong one can be made good. Walk the maze that the prompt shows.

    prompt      A< B^ C> D< E^ F< 0_ _4     the door that leads on from each room, and four moves
    response    04 < B 03 ^ C 02 < B 01 ^ C END     moves left, door taken, room that it leads to

Six rooms in a ring; the door that the prompt shows leads on to the next room, the other two back to the one before. The walk
begins in A. It is right if each room is where its door leads and the walker ends more than half as many rooms ahead as there
are moves: a wrong turn takes back a room, which later moves may win again. (The walk above is consistent, and two rooms ahead:
not right.) A wrong turn changes no length.

The base model reads mazes, and misreads the doors of A, C and E: there it goes on with probability 0.52, and otherwise mostly
through one wrong door of its habit for this room and this sign. Moves lead from an even to an odd room and back, so half of
them are doubtful whatever the maze; from beginning to end they move the value up and down, and no token decides alone.

Test problems are (doors, moves) that are in no train prompt; the habits are shared, they are what is unlearnt.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from tppo_ref.tasks.synthetic import END, FIRST_OWN_TOKEN, LONG_STEPS, Problem, SyntheticTask, draw_steps, prompt_number, two_digits

ROOMS, DOORS = "ABCDEF", "<^>"
NUM_ROOMS, NUM_DOORS = len(ROOMS), len(DOORS)
MAX_MOVES = 72
"""So that the longest walk, of four tokens a move, is no longer than the longest responses of the other tasks."""
LONG_SHARE = 0.25
"""More long problems than the other tasks have: most tokens lie in rows that a window of 64 cuts."""
RIGHT_DOOR_PROBABILITY = 0.52
FAVOURITE_SHARE = 0.7
"""Share of the wrong turns that are the same wrong turn every time for a room and its sign."""

_DOOR = FIRST_OWN_TOKEN
_ROOM = _DOOR + NUM_DOORS
_SIGN = _ROOM + NUM_ROOMS  # then a token for each room with each door
_WORLD = random.Random("maze world 0")
FAVOURITE_WRONG = [[(door + _WORLD.randrange(1, NUM_DOORS)) % NUM_DOORS for door in range(NUM_DOORS)] for _ in ROOMS]
"""Per room and sign: the wrong door that the base model favours."""


def doubtful(room: int) -> bool:
    """Whether the base model misreads the doors of that room."""
    return room % 2 == 0


def walk(signs: Sequence[int], doors: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """The response that takes these doors, one a move, end token included; and how many rooms ahead it ends."""
    ids: list[int] = []
    ahead = 0
    for done, door in enumerate(doors):
        ahead += 1 if door == signs[ahead % NUM_ROOMS] else -1
        ids += (*two_digits(len(doors) - done), _DOOR + door, _ROOM + ahead % NUM_ROOMS)
    return (*ids, END), ahead


def verify(answer: str, response_token_ids: Sequence[int], response_text: str | None = None) -> float:
    """+1.0 if counters, doors, rooms and the end fit each other and the walk leads far enough, else -1.0.

    `answer` is the six signs and the number of moves.
    """
    *signs, moves = map(int, answer.split())
    doors = [token - _DOOR for token in response_token_ids[2:-1:4]]
    if len(doors) != moves or not all(0 <= door < NUM_DOORS for door in doors):
        return -1.0
    ids, ahead = walk(signs, doors)
    return 1.0 if tuple(response_token_ids) == ids and 2 * ahead > moves else -1.0


class MazeTask(SyntheticTask):
    """Problems are (six signs, moves). Options: see `SyntheticTask`; `long_share` is 0.25 here."""

    name = "maze"
    verifier = "tppo_ref.tasks.maze:verify"
    own_tokens = (*DOORS, *ROOMS, *(room + door for room in ROOMS for door in DOORS))
    max_prompt_tokens = NUM_ROOMS + 2
    max_response_tokens = 4 * MAX_MOVES + 1

    def __init__(self, *, seed: int = 0, num_train: int = 4096, num_test: int = 256, long_share: float = LONG_SHARE) -> None:
        super().__init__(seed=seed, num_train=num_train, num_test=num_test, long_share=long_share)

    def draw_problem(self, rng: random.Random, long_share: float) -> Problem:
        signs = (rng.randrange(NUM_DOORS) for _ in ROOMS)
        moves = draw_steps(rng, long_share)
        return *signs, moves if moves <= MAX_MOVES else rng.randint(LONG_STEPS[0], MAX_MOVES)

    def prompt_ids(self, problem: Problem) -> tuple[int, ...]:
        *signs, moves = problem
        return (*(_SIGN + NUM_DOORS * room + door for room, door in enumerate(signs)), *prompt_number(moves))

    def answer(self, problem: Problem) -> str:
        return " ".join(map(str, problem))

    def solve(self, problem: Problem) -> tuple[int, ...]:
        """The walk without a wrong turn: one right response of several."""
        *signs, moves = problem
        return walk(signs, [signs[done % NUM_ROOMS] for done in range(moves)])[0]

    def demonstrate(self, problem: Problem, rng: random.Random) -> tuple[int, ...]:
        """In A, C and E the door may be wrong, and the walk goes on from where it leads."""
        *signs, moves = problem
        doors: list[int] = []
        room = 0
        for _ in range(moves):
            door = signs[room]
            if doubtful(room) and rng.random() >= RIGHT_DOOR_PROBABILITY:
                other = (door + rng.randrange(1, NUM_DOORS)) % NUM_DOORS
                door = FAVOURITE_WRONG[room][door] if rng.random() < FAVOURITE_SHARE else other
            room = (room + (1 if door == signs[room] else -1)) % NUM_ROOMS
            doors.append(door)
        return walk(signs, doors)[0]
