// Errors that a client may see.

package main

import "net/http"

// apiError is an error that a client may see.
type apiError struct {
	status     int
	Text       string `json:"error"`            // a fixed text
	Code       string `json:"code,omitempty"`   // of the closed set in openapi.yaml; the gateway's own errors have none
	TaskStatus string `json:"status,omitempty"` // of the task, in a 409

	// With a body of reports: which line is bad, or how many were taken before a shutdown.
	Line    int  `json:"line,omitempty"`
	Reports *int `json:"reports,omitempty"`
}

func (e *apiError) Error() string { return e.Text }

func newError(status int, code, text string) *apiError {
	return &apiError{status: status, Text: text, Code: code}
}

func badRequest(code, text string) *apiError { return newError(http.StatusBadRequest, code, text) }
