# SPDX-License-Identifier: Apache-2.0
"""Drafts in the formats that other projects publish and load."""
