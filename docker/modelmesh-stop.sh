#!/bin/sh
# The preStop hook that ModelMesh's controller configures: begins the drain, and with `wait` lasts until the container ends.
kill -TERM 1
[ "$1" = wait ] && exec sleep infinity
