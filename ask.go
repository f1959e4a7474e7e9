// The gateway's callbacks: they ask the backend who may have a stream, and tell it who left. Streams are in sidecar.go,
// refusals in refuse.go.

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"syscall"
	"time"
)

// connect asks the backend whether s may be opened. It returns its answer, or why not.
func (g *gateway) connect(r *http.Request, s *stream) (*callbackAnswer, *refusal) {
	order := fmt.Sprintf("%s-%d", g.name, g.requests.Add(1))
	ctx, cancel := context.WithTimeout(g.asking, callbackLimit)
	defer cancel()
	select {
	case g.connecting <- struct{}{}:
		defer func() { <-g.connecting }()
	case <-ctx.Done():
		g.met.callbacks.with("connect", outcome(0, ctx.Err())).Inc()
		return nil, explain(ctx.Err())
	case <-r.Context().Done():
	}
	if r.Context().Err() != nil || hasLeft(r) { // before the backend was asked
		return nil, &refusal{status: http.StatusServiceUnavailable, text: "client left"}
	}
	c := callback{action: "connect", token: s.token, url: r.RequestURI, lastEventID: headerText(r, "Last-Event-Id"), order: order}
	code, body, err := g.call(ctx, c, "", s.request)
	switch {
	case err == nil && code/100 == 2:
		return g.parseAnswer(body), nil
	case code >= 300:
		return nil, rejection(code, body)
	case code/100 == 2: // it has accepted, but its answer broke off
		g.spawn(func() { g.disconnect(s, streamError) })
	}
	return nil, explain(err)
}

// hasLeft reports whether the client has closed its connection, which the request's context may learn later. A browser
// closes a connection before it tries again. So if two of its requests get their numbers in the wrong order, the older
// is noticed here, and does not replace the newer.
func hasLeft(r *http.Request) (left bool) {
	conn, ok := r.Context().Value(connKey{}).(syscall.Conn)
	if !ok {
		return false
	}
	raw, _ := conn.SyscallConn()          // fails for a nil connection alone
	err := raw.Control(func(fd uintptr) { // not raw.Read, as net/http is reading
		n, _, err := syscall.Recvfrom(int(fd), make([]byte, 1), syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		left = n == 0 || err != nil && err != syscall.EAGAIN && err != syscall.EINTR
	})
	return left || err != nil
}

// explain returns the refusal for a backend that was not heard, or not asked because of a shutdown.
func explain(err error) *refusal {
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return &refusal{http.StatusGatewayTimeout, refusedBackend, "backend too slow"}
	case errors.Is(err, context.Canceled):
		return &refusal{http.StatusServiceUnavailable, refusedCapacity, "shutting down"}
	}
	return &refusal{http.StatusServiceUnavailable, refusedBackend, "backend unreachable"}
}

// disconnect makes the disconnect callback of an accepted stream that has ended. It is tried once.
func (g *gateway) disconnect(s *stream, reason string) {
	turn, cancel := context.WithTimeout(context.Background(), disconnectLimit)
	defer cancel()
	select {
	case g.disconnecting <- struct{}{}:
		defer func() { <-g.disconnecting }()
	case <-turn.Done():
		g.met.callbacks.with("disconnect", "timeout").Inc()
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), callbackLimit)
	defer cancel()
	g.call(ctx, callback{action: "disconnect", token: s.token}, reason, s.request)
}

// call makes one callback and counts it. The status is set if the backend sent one, also when its body then failed.
func (g *gateway) call(ctx context.Context, c callback, reason string, request json.RawMessage) (status int, body []byte, err error) {
	action, start := c.action, time.Now()
	if g.backend != nil {
		status, body = g.backend(c)
	} else {
		header := http.Header{"Content-Type": {jsonType}, featuresHeader: {gatewayFeatures}}
		if c.order != "" {
			header.Set(orderHeader, c.order)
		}
		payload := encodeCallback(action, reason, c.token, request)
		status, body, err = postTo(ctx, g.transport, string(g.cfg.CallbackURL), header, payload, maxAnswer+1)
	}
	if status >= 300 {
		err = nil // the body is not needed
	}
	g.met.callbackSeconds.with(action).observe(time.Since(start).Seconds())
	g.met.callbacks.with(action, outcome(status, err)).Inc()
	switch {
	case err != nil:
		g.failed.log(g.log, slog.LevelWarn, "callback failed", "action", action, "err", err)
	case status == http.StatusUnauthorized:
		g.misdirected.log(g.log, slog.LevelWarn, "the backend refuses callbacks: is the secret in CALLBACK_URL right?", "status", status)
	case status/100 == 3, status == http.StatusNotFound, status == http.StatusMethodNotAllowed:
		g.misdirected.log(g.log, slog.LevelWarn, "the backend takes no callbacks there: is the path of CALLBACK_URL right?", "status", status)
	}
	return status, body, err
}

// outcome is what became of a callback, in metrics.
func outcome(status int, err error) string {
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return "timeout"
	case err != nil:
		return "error"
	case status/100 != 2:
		return "rejected"
	}
	return "accepted"
}

// parseAnswer reads {"event":{…},"close":true,"heartbeat":"event"}, the answer to a connect callback. It leaves out
// what it does not understand: the backend has accepted.
func (g *gateway) parseAnswer(body []byte) *callbackAnswer {
	a := &callbackAnswer{}
	if len(bytes.TrimSpace(body)) == 0 {
		return a
	}
	var e eventFields
	var end, beat []byte
	err := pick(body, e.field(), member{"close", &end, nil}, member{"heartbeat", &beat, nil})
	if len(body) > maxAnswer {
		err = errBodyTooLarge
	}
	if err == nil {
		var eventErr, endErr error
		a.event, eventErr = e.parse()
		a.end, endErr = parseBool(end)
		a.beatEvent = byteAt(beat, 0) == '"' && isString(beat, "event")
		if beat != nil && !a.beatEvent {
			err = errFieldType
		}
		err = errors.Join(eventErr, endErr, err)
	}
	if err != nil {
		g.log.Warn("ignoring a part of the callback's answer", "err", err)
	}
	return a
}
