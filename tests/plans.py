"""Settings of a small network of three modules for plans, and the bytes of its messages."""

from runs import small_config

from dgl_jax.config import make_settings

# Bytes per image on 8x8 images with width 4: the messages of the first two modules have 8x8x4 and
# 4x4x8 float32 values, a label and an id.
BYTES = [8 * 8 * 4 * 4 + 8, 4 * 4 * 8 * 4 + 8]
BATCH = 8


_FIELDS = {
    "model__name": "cnn4",
    "model__modules": 3,
    "model__split": "0,1,2",
    "data__batch_size": BATCH,
}


def small(**fields):
    return make_settings(small_config(**_FIELDS | fields))


def milliseconds(spans, module):
    return [(round(1e3 * s.begin, 6), round(1e3 * s.end, 6)) for s in spans if s.module == module]
