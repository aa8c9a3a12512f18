# SPDX-License-Identifier: Apache-2.0
"""Interleaved measurements of the decoding modes, as tables and plots."""
