# SPDX-License-Identifier: Apache-2.0
"""Answers recorded once, and learned from as often as wanted."""
