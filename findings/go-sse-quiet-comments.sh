#!/usr/bin/env bash
# A server keeps a quiet stream open with comment lines. github.com/tmaxmax/go-sse v0.12.0 and github.com/r3labs/sse/v2
# v2.10.0 (Go) keep every one of them until a blank line comes, as both wait for the end of a block. A comment needs no
# blank line behind it, so on a stream that has no events for long enough the comments alone reach the limit of 65,536
# bytes: the stream ends with "token too long", although no event was longer than a few bytes.
# github.com/launchdarkly/eventsource v1.11.0 reads by line, and goes on.
#
# Seen: a stream of 40,000 comment lines of 15 bytes (a week, at one in 15 s) and then one short event: go-sse and
# r3labs have asked again before the event came, launchdarkly gets it on its first request.
# Fails if that changes. Needs bash, Go, python3.
set -euo pipefail
dir=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$dir"' EXIT
cd "$dir"
cat >server.py <<'P'
import http.server, time
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            self.wfile.write(b"data: first\n\n")
            for _ in range(400):
                self.wfile.write(b": still there \n" * 100)
            self.wfile.write(b"\ndata: last\n\n")
            time.sleep(20)
        except OSError:
            pass
    def log_message(self, *args):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", 18616), Handler).serve_forever()
P
cat >main.go <<'G'
package main

import (
	"fmt"
	"net/http"
	"os"
	"time"

	launchdarkly "github.com/launchdarkly/eventsource"
	r3labs "github.com/r3labs/sse/v2"
	tmaxmax "github.com/tmaxmax/go-sse"
)

const url = "http://127.0.0.1:18616/"

func main() {
	got := map[string]chan string{"tmaxmax": make(chan string), "r3labs": make(chan string), "launchdarkly": make(chan string)}
	errs := make(chan string, 2)
	go func() {
		client := tmaxmax.Client{OnRetry: func(err error, _ time.Duration) { errs <- err.Error() }}
		req, _ := http.NewRequest("GET", url, nil)
		conn := client.NewConnection(req)
		conn.SubscribeToAll(func(e tmaxmax.Event) { got["tmaxmax"] <- e.Data })
		conn.Connect()
	}()
	go func() {
		c := r3labs.NewClient(url)
		c.ReconnectNotify = func(err error, _ time.Duration) { errs <- err.Error() }
		c.SubscribeRaw(func(e *r3labs.Event) { got["r3labs"] <- string(e.Data) })
	}()
	go func() {
		stream, _ := launchdarkly.SubscribeWithURL(url)
		for e := range stream.Events {
			got["launchdarkly"] <- e.Data()
		}
	}()
	changed := false
	for name, second := range map[string]string{"tmaxmax": "first", "r3labs": "first", "launchdarkly": "last"} {
		a, b := <-got[name], <-got[name]
		fmt.Printf("%s: %s, %s\n", name, a, b)
		changed = changed || a != "first" || b != second
	}
	fmt.Printf("%s\n%s\n", <-errs, <-errs)
	if changed {
		os.Exit(1)
	}
}
G
go mod init finding 2>/dev/null
go get github.com/tmaxmax/go-sse@v0.12.0 github.com/r3labs/sse/v2@v2.10.0 github.com/launchdarkly/eventsource@v1.11.0 2>/dev/null
go build -o main .
python3 server.py &
until (echo >/dev/tcp/127.0.0.1/18616) 2>/dev/null; do sleep .1; done
timeout 20 ./main
