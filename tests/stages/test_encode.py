"""The encode actor, as far as it can be tested without an actor pool."""

import logging

from embedjob.stages.encode import _logged_warnings


def test_the_warnings_of_a_load_are_collected_and_nothing_after_it() -> None:
    logger = logging.getLogger("embedjob.encoder.backbone")
    with _logged_warnings() as notes:
        logger.info("loaded")
        logger.warning("the model's own %s is used", "BertLayer")
        logging.getLogger("transformers").warning("another library")
    logger.warning("later")
    assert notes == ["the model's own BertLayer is used"]
