"""Studies: many students on one store, what is asked of them fixed before they are trained, and the answers.

``protocol.yaml`` says what is trained and compared, `command` does what is missing of it, `analysis` has the numbers,
`page` writes them down, and `control` has the teachers of the control arm.
"""
