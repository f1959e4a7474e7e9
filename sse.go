// The wire form of Server-Sent Events, WHATWG HTML section 9.2.5 "Parsing an event stream", and nothing else.
// Everything here appends to a buffer, so that one event goes out in one write.

package main

import (
	"bytes"
	"strconv"
	"strings"
)

// heartbeat is a comment: it keeps proxies from closing an idle stream. It is no longer than it must be: clients exist
// that count the comments before an event into what the event may have.
const heartbeat = ":\n"

// isOneLine reports whether an ID or name stays on its line, and whether the browser takes it: an ID with NUL it
// ignores (section 9.2.6).
func isOneLine(s []byte) bool { return !bytes.ContainsAny(s, "\r\n\x00") }

// sentEvent is an event as the gateway reads it. Without data it is none.
type sentEvent struct {
	id, name, data []byte
	oneLine        bool // there is no line end in data, which need not be searched for one
	retry          int  // the browser's reconnection time from now on, in milliseconds; 0 leaves it
}

// appendEvent appends an event. Without an ID the browser keeps its last event ID, without a name it dispatches a
// "message"; each must be on one line.
//
//	retry: 2500
//	event: task_event
//	data: first line
//	data: second line
//	id: k3v9-17
//	(blank line)
//
// The data is cut at CRLF, LF and CR, which the browser gives back as LF. The ID is last because clients exist that
// count that of an event which the end of a connection has cut, and then never get the event.
func appendEvent(b []byte, e sentEvent) []byte {
	if e.retry > 0 {
		b = appendRetry(b, e.retry)
	}
	if len(e.name) > 0 {
		b = append(b, "event: "...)
		b = append(b, e.name...)
		b = append(b, '\n')
	}
	data := e.data
	lineEnd := func(s []byte) int { return bytes.IndexAny(s, "\r\n") }
	if e.oneLine {
		lineEnd = func([]byte) int { return -1 }
	} else if bytes.IndexByte(data, '\r') < 0 { // as nearly always, and several times faster
		lineEnd = func(s []byte) int { return bytes.IndexByte(s, '\n') }
	}
	for {
		b = append(b, "data: "...)
		i := lineEnd(data)
		if i < 0 {
			b = append(b, data...)
			if len(e.id) > 0 {
				b = append(b, "\nid: "...)
				b = append(b, e.id...)
			}
			return append(b, "\n\n"...)
		}
		b = append(b, data[:i]...)
		b = append(b, '\n')
		if bytes.HasPrefix(data[i:], []byte("\r\n")) {
			i++
		}
		data = data[i+1:]
	}
}

// Only an event ends in a blank line: after a retry or a comment, clients exist that take it for an empty event. A
// retry stands in the block of what follows.

// appendRetry appends the reconnection time in milliseconds.
func appendRetry(b []byte, milliseconds int) []byte {
	b = append(b, "retry: "...)
	b = strconv.AppendInt(b, int64(milliseconds), 10)
	return append(b, '\n')
}

// appendComment appends a comment, of which it makes one line.
func appendComment(b []byte, text string) []byte {
	b = append(b, ": "...)
	b = append(b, strings.NewReplacer("\r", " ", "\n", " ").Replace(text)...)
	return append(b, '\n')
}
