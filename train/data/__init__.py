"""Data: text and its tokens, images, pairs of sentences, points, and the order in which examples come.

A batch is a function of key and step, so that a resumed run sees the batches that it would have seen.

- `batching`: which examples make up which batch. `downloads`: published files, fetched once and checked.
- `fingerprint`: the identity of data, a hash of its content, whatever kind it is and wherever it lies.
- `understood`: prints the facts that each kind of data gives (`facts`) at the start of a script.
- `text/`: `files` (UTF-8 files, gzipped files, folders, streams), `text` (the embedded text, `open_text`, the split,
  windows for language models, the unigram baseline), `token_files` (ids on disk), `tokenizers`; `labelled` (texts with
  a class each), `brackets` (generated ones), `ragged` (their batches).
- `images/`: `sets` (`open_images`: whatever `--data` names), `arrays` (digits, MNIST's files, downloads), `cifar`,
  `folders` (the pictures of a folder, its classes and splits), `shards` (those in tars), `files` (batches decoded by
  worker processes, built on `workers`), `picture` (one file decoded), `full_range` (with 16 bits and alpha), `pairs`
  (for image-to-image translation), `originals` and `patches` (for super-resolution), `resize`, `augment`, `colours`,
  `rectangles`; `scenes` (generated digits with masks and boxes), `mask_sets` (`open_masks`: folders of pictures with
  masks, by `mask_folders` and `masks`), `windows` (their batches), `mask_baselines`, `blended_tiles`.
- `translation/`: `sets` (`open_pairs`: whatever `--data` names), `files` (pairs of sentences in files), `corpus` (as
  token ids), `buckets` (batches of similar length), `dates` and `number_words` (the embedded pairs).
- `points/`: `mixtures` of Gaussians in the plane. `series`: values over time, generated or of a CSV, and windows.

- `file_tree`: the files below a folder, for text and images.

One bad record (a picture, a line, a pair) is named, skipped and counted. Where data has no part for testing, one is
held out in blocks or at random, never at the end.
"""

from train.files import shown


class DataError(ValueError):
    """Data cannot be found, read or used; one line that names the file or the value and what was expected.

    The line can be printed even if it contains file names that are not UTF-8.
    """

    def __init__(self, message: str):
        super().__init__(shown(message))
