package main

import (
	"errors"
	"strconv"
	"strings"
)

// The wire form of Server-Sent Events, WHATWG HTML section 9.2.5 "Parsing an
// event stream". Everything here appends to a buffer, so that one event goes
// out in one write.

// heartbeat is a comment: it keeps proxies from closing an idle stream.
const heartbeat = ": heartbeat\n"

// event is one message of a stream. An empty ID or Name is left out, so the
// browser keeps its last event ID and dispatches a "message".
type event struct {
	ID   string
	Name string
	Data string
}

// errEventField says that an ID or Name would break out of its line, or that
// the browser would ignore it (NUL in an ID, section 9.2.6).
var errEventField = errors.New("event name and id must not contain CR, LF or NUL")

func (e event) validate() error {
	if strings.ContainsAny(e.ID, "\r\n\x00") || strings.ContainsAny(e.Name, "\r\n\x00") {
		return errEventField
	}
	return nil
}

// appendEvent appends a valid event:
//
//	id: k3v9-17
//	event: task_event
//	data: first line
//	data: second line
//	(blank line)
//
// The data is cut at CRLF, LF and CR, which the browser gives back as LF.
func appendEvent(b []byte, e event) []byte {
	if e.ID != "" {
		b = append(b, "id: "...)
		b = append(b, e.ID...)
		b = append(b, '\n')
	}
	if e.Name != "" {
		b = append(b, "event: "...)
		b = append(b, e.Name...)
		b = append(b, '\n')
	}
	rest := e.Data
	lineEnd := func(s string) int { return strings.IndexAny(s, "\r\n") }
	if strings.IndexByte(rest, '\r') < 0 { // as nearly always, and several times faster
		lineEnd = func(s string) int { return strings.IndexByte(s, '\n') }
	}
	for {
		b = append(b, "data: "...)
		i := lineEnd(rest)
		if i < 0 {
			b = append(b, rest...)
			return append(b, "\n\n"...)
		}
		b = append(b, rest[:i]...)
		b = append(b, '\n')
		if strings.HasPrefix(rest[i:], "\r\n") {
			i++
		}
		rest = rest[i+1:]
	}
}

// Only an event ends in a blank line. After a retry or a comment it would
// make a browser that follows section 9.2.6 to the letter forget the last
// event ID, if this stream has not told it one yet.

// appendRetry appends the reconnection time in milliseconds.
func appendRetry(b []byte, milliseconds int) []byte {
	b = append(b, "retry: "...)
	b = strconv.AppendInt(b, int64(milliseconds), 10)
	return append(b, '\n')
}

// appendComment appends a comment; text is one line.
func appendComment(b []byte, text string) []byte {
	b = append(b, ": "...)
	b = append(b, text...)
	return append(b, '\n')
}
