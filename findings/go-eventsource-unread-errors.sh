#!/usr/bin/env bash
# github.com/launchdarkly/eventsource v1.11.0 and github.com/donovanhide/eventsource v0.0.0-20210830082556-c59027999da0
# (Go) connect again by themselves after a cut, and the latter says that nobody has to act on what comes from its
# channel Errors. But somebody has to read it: in both it has no buffer, so without a reader the first cut ends the
# events for good, and nothing tells. An application that reads Events alone works until the server first restarts.
#
# Seen: against a server that ends each answer after one event, with retry: 100, 1 event in 3 s, and with the loop
# "for range stream.Errors {}" in a goroutine more than 20.
# Fails if that changes. Needs bash, Go, python3.
set -euo pipefail
dir=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$dir"' EXIT
cd "$dir"
cat >server.py <<'P'
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.wfile.write(b"retry: 100\ndata: x\n\n")
    def log_message(self, *args):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", 18611), Handler).serve_forever()
P
cat >main.go <<'G'
package main

import (
	"fmt"
	"os"
	"time"

	donovanhide "github.com/donovanhide/eventsource"
	launchdarkly "github.com/launchdarkly/eventsource"
)

func count[E any](events chan E, errors chan error, read bool) (n int) {
	if read {
		go func() {
			for range errors {
			}
		}()
	}
	end := time.After(3 * time.Second)
	for {
		select {
		case <-events:
			n++
		case <-end:
			return n
		}
	}
}

func main() {
	changed := false
	for _, read := range []bool{false, true} {
		l, err := launchdarkly.SubscribeWithURL("http://127.0.0.1:18611/")
		if err != nil {
			panic(err)
		}
		d, err := donovanhide.Subscribe("http://127.0.0.1:18611/", "")
		if err != nil {
			panic(err)
		}
		nl, nd := count(l.Events, l.Errors, read), count(d.Events, d.Errors, read)
		fmt.Printf("errors read: %t; events of launchdarkly: %d, of donovanhide: %d\n", read, nl, nd)
		changed = changed || min(nl, nd) > 10 != read || max(nl, nd) > 1 != read
	}
	if changed {
		os.Exit(1)
	}
}
G
go mod init finding 2>/dev/null
go get github.com/launchdarkly/eventsource@v1.11.0 github.com/donovanhide/eventsource@v0.0.0-20210830082556-c59027999da0 2>/dev/null
go build -o main .
python3 server.py &
until (echo >/dev/tcp/127.0.0.1/18611) 2>/dev/null; do sleep .1; done
./main
