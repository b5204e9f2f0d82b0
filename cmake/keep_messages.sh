#!/bin/sh
# usage: keep_messages.sh OBJECT COMPILER ARGUMENT...
# Runs a compiler and keeps its messages in OBJECT.log. They are shown too, less the resource report
# that ptxas writes for every kernel.
log=$1.log
shift
"$@" >"$log" 2>&1
status=$?
if [ "$status" -ne 0 ]; then
  cat "$log"
else
  grep -vE '^ptxas info|^ *[0-9]+ bytes stack frame|^$' "$log"
fi
exit "$status"
