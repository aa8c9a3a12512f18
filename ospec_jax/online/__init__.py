# SPDX-License-Identifier: Apache-2.0
"""Learning while serving: from what, how often, and what is served."""
