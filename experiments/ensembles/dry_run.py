"""What ``--dry_run`` shows of a comparison of ensembles."""

from __future__ import annotations

import functools
import logging
from dataclasses import asdict

from experiments.compare import choose_device, warm_up
from experiments.dry_run import Row, about_training, in_turn, labels_of, overview, where
from experiments.ensembles.data import Images
from experiments.ensembles.estimate import estimate_ensemble
from experiments.ensembles.evaluation import check_protocol
from experiments.ensembles.plan import EnsemblePlan
from experiments.ensembles.run import EnsembleCell, finished_record, model_folder, protocol_dict
from lifelong_ens.ensembles.ensemble import FILE

log = logging.getLogger(__name__)


def dry_run(plan: EnsemblePlan) -> str:
    """The images, a table with a row for every method, and what else is to be known; nothing is written.

    Raises:
        InputError: There are no images, they do not fit the network, or there is no such device.
    """
    device = choose_device(plan.device)
    images = plan.images()
    check_protocol(plan.protocol, images)
    build = plan.network_for(images)
    warm_up(device)
    wanted = protocol_dict(plan.protocol, images)
    rows: dict[str, Row] = {}
    labels = labels_of([cell.method for cell, _ in plan.cells])
    for label, (cell, function) in zip(labels, plan.cells, strict=True):
        if label not in rows:
            log.info("%s: its first steps", label)
            rows[label] = Row.of(
                1, functools.partial(estimate_ensemble, cell, function, build, images, device)
            )
        finished = not plan.force and finished_record(cell, wanted, plan.out) is not None
        trained = not plan.force and (model_folder(cell, plan.out) / FILE).exists()
        rows[label].done.append(int(finished or trained))
        rows[label].unmeasured += trained and not finished
    about = _about(plan.cells[0][0], images)
    return overview([*about, where(plan.out, device)], rows, "method", in_turn(plan.engine))


def _about(cell: EnsembleCell, images: Images) -> list[str]:
    """Images, network and training in a line each."""
    return [
        f"data: {images.name}, {len(images.class_names)} classes, {len(images.train):,} training, "
        f"{len(images.validation):,} validation and {len(images.test):,} test images",
        f"{about_training(cell.network.name, asdict(cell.fit), 'of a network')}; members: {cell.num_members}",
    ]
