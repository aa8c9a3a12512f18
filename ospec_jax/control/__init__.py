# SPDX-License-Identifier: Apache-2.0
"""How much to draft, and with what: decided from what was accepted before."""
