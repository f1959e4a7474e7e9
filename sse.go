// The wire form of Server-Sent Events, WHATWG HTML section 9.2.5 "Parsing an event stream", and nothing else.
// Everything here appends to a buffer, so that one event goes out in one write.

package main

import (
	"bytes"
	"strconv"
	"strings"
)

// heartbeat is a comment, which keeps proxies from closing an idle stream. It is as short as possible: some clients
// count comments towards the size that the next event may have.
const heartbeat = ":\n"

// isOneLine reports whether an ID or a name stays on its line and has no NUL, with which browsers ignore an ID (section
// 9.2.6).
func isOneLine(s []byte) bool { return !bytes.ContainsAny(s, "\r\n\x00") }

// sentEvent is an event as the gateway reads it. There is none if data is nil.
type sentEvent struct {
	id, name, data []byte
	oneLine        bool // data is known to have no line end, and need not be searched for one
	retry          int  // the browser's reconnection time in milliseconds; 0 leaves it unchanged
}

// appendEvent appends an event. Without an ID the browser keeps its last event ID; without a name it dispatches a
// "message". Each must be on one line.
//
//	retry: 2500
//	event: task_event
//	data: first line
//	data: second line
//	id: k3v9-17
//	(blank line)
//
// The data is split at CRLF, LF and CR; the browser joins the lines with LF. The ID comes last, as some clients take
// over the ID of an event that was cut off, and then never get the event.
func appendEvent(b []byte, e sentEvent) []byte {
	if e.retry > 0 {
		b = appendRetry(b, e.retry)
	}
	if len(e.name) > 0 {
		b = appendField(b, "event: ", e.name)
	}
	if e.oneLine {
		b = appendField(b, "data: ", e.data)
	} else {
		data := e.data
		if bytes.IndexByte(data, '\r') >= 0 { // hardly ever
			data = bytes.ReplaceAll(data, []byte("\r\n"), []byte("\n"))
			data = bytes.ReplaceAll(data, []byte("\r"), []byte("\n"))
		}
		for line := range bytes.SplitSeq(data, []byte("\n")) {
			b = appendField(b, "data: ", line)
		}
	}
	if len(e.id) > 0 {
		b = appendField(b, "id: ", e.id)
	}
	return append(b, '\n')
}

func appendField(b []byte, name string, value []byte) []byte {
	b = append(b, name...)
	b = append(b, value...)
	return append(b, '\n')
}

// appendRetry appends the reconnection time in milliseconds. No blank line follows, as after a comment: some clients
// dispatch an empty event for one.
func appendRetry(b []byte, milliseconds int) []byte {
	b = append(b, "retry: "...)
	b = strconv.AppendInt(b, int64(milliseconds), 10)
	return append(b, '\n')
}

// appendComment appends a comment, with its text on one line.
func appendComment(b []byte, text string) []byte {
	b = append(b, ": "...)
	b = append(b, strings.NewReplacer("\r", " ", "\n", " ").Replace(text)...)
	return append(b, '\n')
}
