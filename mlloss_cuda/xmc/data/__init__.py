"""Reading multi-label data, and writing it as text.

Files are told apart by how they start:

* XMC text, the format of the Extreme Classification Repository: a header `N D L` (rows, features,
  labels), then per row `label,label,... feature:value feature:value ...` with ids from 0.
* libsvm text with several labels per row: the same rows without a header. Feature ids and label
  ids start at 0 or 1; `read_pair` finds out which from the training and the test file together.
* A file of features and a file of labels, as the repository and pyxclib have them: headers `N D`
  and `N L`, then per row `id:value id:value ...` with ids from 0; a row without entries is an empty
  line. Either may be a CSR matrix saved by `scipy.sparse.save_npz`; the features may be dense,
  [N, D], saved by `numpy.save`.

In XMC and libsvm text, a row without labels starts with a space; a row may have no features. A
label listed twice in a row counts once. In all text, spaces and tabs separate, Windows line ends
and a byte-order mark are accepted, and empty lines at the end are ignored. Text may be packed with
gzip. Everything else is a `DataError` that names the file, the line and what was expected.

Two parsers share the work. One of `block_parser.py` handles megabytes at a time and only knows
right from wrong; that of `row_parser.py` handles one line, and explains. The second one is called
when the first one refuses a line, so an error message costs no speed on good files.

    files        opening and writing files, DataError
    csr          CSR arrays from scipy, NumPy and lists, checked
    dataset      Dataset
    row_parser   one line, with reasons
    block_parser many lines: native, or with NumPy
    text         text files
    binary       .npz and .npy files
    cache        what was parsed, mapped into memory the next time
    reading      read_dataset and read_pair
    filters      pairs of rows and labels that predictions leave out
    sources      data sets that scikit-learn fetches
"""

from mlloss_cuda.xmc.data.csr import (
    LARGEST_ID,
    SIZE_LIMIT,
    DenseArray,
    FloatArray,
    IntArray,
    gather_rows,
    offsets_of,
    row_chunks,
)
from mlloss_cuda.xmc.data.dataset import Dataset
from mlloss_cuda.xmc.data.files import DataError, atomic_file, check_writable, sync_folder
from mlloss_cuda.xmc.data.filters import read_filter_pairs
from mlloss_cuda.xmc.data.reading import read_dataset, read_features, read_pair
from mlloss_cuda.xmc.data.sources import from_sklearn_openml, from_sklearn_rcv1
from mlloss_cuda.xmc.data.text import write_dataset

__all__ = [
    "LARGEST_ID",
    "SIZE_LIMIT",
    "DataError",
    "Dataset",
    "DenseArray",
    "FloatArray",
    "IntArray",
    "atomic_file",
    "check_writable",
    "from_sklearn_openml",
    "from_sklearn_rcv1",
    "gather_rows",
    "offsets_of",
    "read_dataset",
    "read_features",
    "read_filter_pairs",
    "read_pair",
    "row_chunks",
    "sync_folder",
    "write_dataset",
]
