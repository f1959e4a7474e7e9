// The gateway's callbacks: they ask the backend who may open a stream, and tell it who left. What a stream and a
// refusal are is in sidecar.go and refuse.go.

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"syscall"
	"time"
)

// connect asks the backend whether s may be opened. An answer beside a refusal means that the backend accepted and then
// did not finish its answer.
func (g *gateway) connect(r *http.Request, s *stream) (no *refusal, answer *callbackAnswer) {
	clientLeft := &refusal{status: http.StatusServiceUnavailable, text: "client left"}
	order := fmt.Sprintf("%s-%d", g.name, g.requests.Add(1))
	ctx, cancel := context.WithTimeout(g.asking, callbackLimit)
	defer cancel()
	select {
	case g.connecting <- struct{}{}:
		defer func() { <-g.connecting }()
	case <-ctx.Done():
		g.met.callbacks.with("connect", outcome(0, ctx.Err())).Inc()
		return explain(ctx.Err()), nil
	case <-r.Context().Done(): // the client left before the backend was asked
		return clientLeft, nil
	}
	if hasLeft(r) {
		return clientLeft, nil
	}
	code, body, err := g.call(ctx, "connect", "", s, order)
	switch {
	case err == nil && code/100 == 2:
		return nil, g.parseAnswer(body)
	case code >= 300:
		return rejection(code, body), nil
	case code/100 == 2:
		answer = &callbackAnswer{}
	}
	return explain(err), answer
}

// hasLeft reports whether the client has closed its connection. It looks for itself, as the request's context may not
// know yet. A browser that has tried again left before, so if its first attempt comes to be numbered after its second,
// this is seen here, and the second is not taken for a replaced tab.
func hasLeft(r *http.Request) (left bool) {
	conn, ok := r.Context().Value(connKey{}).(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return true
	}
	err = raw.Control(func(fd uintptr) { // not Read, for which net/http holds a lock
		n, _, err := syscall.Recvfrom(int(fd), make([]byte, 1), syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		left = n == 0 || err != nil && err != syscall.EAGAIN && err != syscall.EINTR
	})
	return left || err != nil
}

// explain tells a client why the backend was not heard.
func explain(err error) *refusal {
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return &refusal{http.StatusGatewayTimeout, refusedBackend, "backend too slow"}
	case errors.Is(err, context.Canceled):
		return &refusal{http.StatusServiceUnavailable, refusedCapacity, "shutting down"}
	}
	return &refusal{http.StatusServiceUnavailable, refusedBackend, "backend unreachable"}
}

// disconnect makes the disconnect callback of an accepted stream: once, with no retry. The stream itself has ended
// before.
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
	g.call(ctx, "disconnect", reason, s, "")
}

// call makes one callback and counts it. The status is set as soon as the backend sent one, also when its body then
// failed.
func (g *gateway) call(ctx context.Context, action, reason string, s *stream, order string) (status int, body []byte, err error) {
	start := time.Now()
	status, body, err = g.post(ctx, encodeCallback(action, reason, s.token, s.request), order)
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

// outcome is what became of a callback, as the metrics have it.
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

func (g *gateway) post(ctx context.Context, payload []byte, order string) (status int, body []byte, err error) {
	header := http.Header{"Content-Type": {jsonType}, featuresHeader: {gatewayFeatures}}
	if order != "" {
		header.Set(orderHeader, order)
	}
	status, body, err = postTo(ctx, g.transport, string(g.cfg.CallbackURL), header, payload, maxAnswer+1)
	if status >= 300 {
		err = nil // that body is not needed
	}
	return status, body, err
}

// parseAnswer reads {"event":{…},"close":true,"heartbeat":"event"} from a connect callback's answer. What is not
// understood is left out: the backend did accept.
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
