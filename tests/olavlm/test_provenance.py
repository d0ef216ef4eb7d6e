"""What a number is to be read with."""

import subprocess
import sys

import numpy as np

SHOW = "from olavlm.provenance import peak_memory_gib; print(peak_memory_gib())"


def test_peak_memory_is_a_process_s_own_also_of_one_that_a_larger_one_starts():
    array = np.ones(2**27)  # 1 GiB
    shown = subprocess.run([sys.executable, "-c", SHOW], capture_output=True, text=True, check=True)
    assert 0.001 < float(shown.stdout) < 0.5
    own = f"import numpy; numpy.ones(2**26); {SHOW}"
    shown = subprocess.run([sys.executable, "-c", own], capture_output=True, text=True, check=True)
    assert 0.5 < float(shown.stdout) < 1
    assert array.nbytes == 2**30
