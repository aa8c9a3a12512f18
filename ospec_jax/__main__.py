# SPDX-License-Identifier: Apache-2.0
"""`python -m ospec_jax` is `ospec`."""

from ospec_jax.cli import main

main()
