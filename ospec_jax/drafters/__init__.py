# SPDX-License-Identifier: Apache-2.0
"""Families of drafters, one file each."""
