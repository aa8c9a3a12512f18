# SPDX-License-Identifier: Apache-2.0
"""Products that XLA's own code does slowly on a CPU, compiled where they are used."""
