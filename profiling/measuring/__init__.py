"""Takes one step under a tracker of live storages, on real or fake tensors, and keeps what it saw as plain data.

From outside: `capture.capture` (`WARM_UP`), `record` (`Record`, `Profile`, `Peak`, `Timeline` and the names in them: `KINDS`,
`versions`), `tracker.Tracker`, `shallow` (`simulated_step`, `Step`, `any_scale`, `with_depth`: a deep model's memory from
shallow ones), `recording` (`Scale`: the rows and the rank that a `Step` is asked for), `clock.PhaseClock` (seconds by phase).

Never: what is measured (`subjects`), how it is shown (`reporting`), or whether it is good enough (`validate`). `record`
imports no torch: a saved record is read without it.
"""
