from __future__ import annotations

import io

from golfmodel.runtime import liveness
from golfmodel.runtime.progress import Progress


def test_places_come_in_the_order_in_which_they_are_reached():
    places, signs = [], []

    def note() -> None:
        places.append(liveness.now().place)
        signs.append(liveness.now().signs)

    note()
    liveness.enter("training", slow=False)
    for step in (1, 2):
        liveness.begin_step(step)
        note()
        liveness.part_done()
        note()
    assert (liveness.now().phase, liveness.now().slow) == ("training", False)
    liveness.enter("scoring")
    note()
    assert places == sorted(set(places))
    assert signs == sorted(set(signs))


def test_a_progress_bar_gives_signs_without_moving_on():
    before = liveness.now()
    with Progress("scoring", 2, stream=io.StringIO(), enabled=False) as progress:
        progress.update()
    assert liveness.now().place == before.place
    assert liveness.now().signs == before.signs + 1
