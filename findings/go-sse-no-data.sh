#!/usr/bin/env bash
# The four common Go clients of Server-Sent Events call the application for a block that has no data line. The HTML
# standard gives such a block a meaning, but none that the application sees: "retry: 5000" alone sets the time, "id: 7"
# alone moves the last event id past what a filter left out, and EventSource dispatches nothing. In Go an event with
# empty data arrives, and a handler that parses its data as JSON fails. Check for empty data first.
#
# Seen: of the blocks "retry: 5000", "id: 7" and "data: x" each client hands on three events, two of them empty.
# Versions: github.com/tmaxmax/go-sse v0.12.0, github.com/r3labs/sse/v2 v2.10.0, github.com/launchdarkly/eventsource
# v1.11.0, github.com/donovanhide/eventsource v0.0.0-20210830082556-c59027999da0.
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
        self.wfile.write(b"retry: 5000\n\nid: 7\n\ndata: x\n\n")
        time.sleep(5)
    def log_message(self, *args):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", 18615), Handler).serve_forever()
P
cat >main.go <<'G'
package main

import (
	"fmt"
	"net/http"
	"os"

	donovanhide "github.com/donovanhide/eventsource"
	launchdarkly "github.com/launchdarkly/eventsource"
	r3labs "github.com/r3labs/sse/v2"
	tmaxmax "github.com/tmaxmax/go-sse"
)

const url = "http://127.0.0.1:18615/"

func main() {
	clients := map[string]func(got chan string){
		"tmaxmax": func(got chan string) {
			req, _ := http.NewRequest("GET", url, nil)
			conn := tmaxmax.NewConnection(req)
			conn.SubscribeToAll(func(e tmaxmax.Event) { got <- e.Data })
			conn.Connect()
		},
		"r3labs": func(got chan string) {
			r3labs.NewClient(url).SubscribeRaw(func(e *r3labs.Event) { got <- string(e.Data) })
		},
		"launchdarkly": func(got chan string) {
			stream, _ := launchdarkly.SubscribeWithURL(url)
			for e := range stream.Events {
				got <- e.Data()
			}
		},
		"donovanhide": func(got chan string) {
			stream, _ := donovanhide.Subscribe(url, "")
			for e := range stream.Events {
				got <- e.Data()
			}
		},
	}
	changed := false
	for name, run := range clients {
		got := make(chan string)
		go run(got)
		n := 1
		for <-got != "x" {
			n++
		}
		fmt.Printf("%s: %d events, %d without data\n", name, n, n-1)
		changed = changed || n != 3
	}
	if changed {
		os.Exit(1)
	}
}
G
go mod init finding 2>/dev/null
go get github.com/tmaxmax/go-sse@v0.12.0 github.com/r3labs/sse/v2@v2.10.0 github.com/launchdarkly/eventsource@v1.11.0 \
  github.com/donovanhide/eventsource@v0.0.0-20210830082556-c59027999da0 2>/dev/null
go build -o main .
python3 server.py &
until (echo >/dev/tcp/127.0.0.1/18615) 2>/dev/null; do sleep .1; done
timeout 20 ./main
